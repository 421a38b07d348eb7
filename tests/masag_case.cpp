// Runs gates through the C API, as a device's program would: `masag_case FILE...`, each a case that
// `test_kernels.py` wrote; the result goes to FILE.out. Every buffer has its exact size, so that a sanitizer sees each
// step beyond it.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "masag.h"

extern "C" void host_device(int capability, int processors, const void* foreign, const void* moved, int launch_error,
                            int copies_at_once);

namespace {

struct Header {
  masag_problem problem;
  int64_t x_strides[4], g_strides[4];
  int64_t x_bytes, g_bytes, weight_bytes[12], out_bytes;
  int64_t processors, copies_at_once;
};

using Buffer = std::unique_ptr<void, decltype(&std::free)>;

Buffer buffer(size_t bytes) {
  Buffer made(std::malloc(bytes), &std::free);
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(made.get())[i] = 0xff;  // NaN
  return made;
}

void require(bool held, const char* what) {
  if (held) return;
  std::fprintf(stderr, "%s: %s\n", what, masag_last_error());
  std::exit(1);
}

Buffer read(std::FILE* file, size_t bytes) {
  Buffer made = buffer(bytes);
  require(std::fread(made.get(), 1, bytes, file) == bytes, "the case is too short");
  return made;
}

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    const std::string name = names[i];
    std::FILE* file = std::fopen(name.c_str(), "rb");
    require(file != nullptr, names[i]);
    Header header;
    require(std::fread(&header, sizeof header, 1, file) == 1, "the case is too short");
    const Buffer x = read(file, header.x_bytes), g = read(file, header.g_bytes);
    std::vector<Buffer> kept;
    const void* weights[12] = {};
    for (int j = 0; j < 12; ++j)
      if (header.weight_bytes[j] > 0) weights[j] = kept.emplace_back(read(file, header.weight_bytes[j])).get();
    std::fclose(file);
    masag_map maps[2] = {{x.get(), {}}, {g.get(), {}}};
    for (int j = 0; j < 4; ++j) {
      maps[0].strides[j] = header.x_strides[j];
      maps[1].strides[j] = header.g_strides[j];
    }
    const masag_weights given{weights[0], weights[1], weights[2], weights[3], weights[4],  weights[5],
                              weights[6], weights[7], weights[8], weights[9], weights[10], weights[11]};
    size_t bytes = 0;
    require(masag_workspace_size(&header.problem, &bytes) == MASAG_OK, names[i]);
    const Buffer workspace = buffer(bytes), out = buffer(header.out_bytes);
    host_device(87, int(header.processors), nullptr, nullptr, 0, int(header.copies_at_once));
    require(masag_forward(&header.problem, &maps[0], &maps[1], &given, out.get(), workspace.get(), bytes, nullptr) ==
                MASAG_OK,
            names[i]);
    file = std::fopen((name + ".out").c_str(), "wb");
    require(file != nullptr && std::fwrite(out.get(), header.out_bytes, 1, file) == 1, names[i]);
    std::fclose(file);
  }
}
