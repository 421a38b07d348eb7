// The example: segments raw frames from a file, checks the device first, and times each.
//   segment BUNDLE PRECISION ROWS COLUMNS CHANNELS FRAMES MASKS [THREADS]
// FRAMES holds ROWS * COLUMNS * CHANNELS bytes a frame, one after the other; MASKS gets ROWS * COLUMNS bytes for each.
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "msa2net.h"

namespace {

int failed(int code) {
  std::fprintf(stderr, "error: %s\n", msa2net_last_error());
  return code;
}

int wrong(const char* what, const char* advice) {
  std::fprintf(stderr, "error: %s. %s\n", what, advice);
  return MSA2NET_ARGUMENT;
}

// -1, which is refused, for what is no number.
int number(const char* text) {
  int value = 0;
  const char* const end = text + std::strlen(text);
  const auto [at, problem] = std::from_chars(text, end, value);
  return at == end && problem == std::errc() ? value : -1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 8 || count > 9) {
    std::fprintf(stderr, "usage: segment BUNDLE PRECISION ROWS COLUMNS CHANNELS FRAMES MASKS [THREADS]\n");
    return MSA2NET_ARGUMENT;
  }
  const int rows = number(arguments[3]), columns = number(arguments[4]), channels = number(arguments[5]);
  msa2net* opened = nullptr;
  if (const int code = msa2net_open(arguments[1], arguments[2], rows, columns, channels,
                                    count == 9 ? number(arguments[8]) : 0, &opened))
    return failed(code);
  const std::unique_ptr<msa2net, void (*)(msa2net*)> model(opened, msa2net_close);

  msa2net_report report{};
  if (const int code = msa2net_self_test(opened, &report)) return failed(code);
  std::printf("bundle %s: %d golden frames pass, largest logit difference %.2e, equal pixels %.4f %%\n",
              msa2net_digest(opened), report.frames, report.logit_difference, 100 * report.pixel_agreement);

  std::ifstream frames(arguments[6], std::ios::binary);
  std::ofstream masks(arguments[7], std::ios::binary);
  if (!frames) return wrong("FRAMES cannot be read", "Check its path.");
  if (!masks) return wrong("MASKS cannot be written", "Check its path.");
  const std::size_t pixels = static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns);
  std::vector<char> frame(pixels * static_cast<std::size_t>(channels)), mask(pixels);
  msa2net_quality quality{};
  while (frames.read(frame.data(), static_cast<std::streamsize>(frame.size()))) {
    const auto start = std::chrono::steady_clock::now();
    const int code = msa2net_predict(opened, reinterpret_cast<const std::uint8_t*>(frame.data()),
                                     reinterpret_cast<std::uint8_t*>(mask.data()), nullptr, &quality);
    if (code) return failed(code);
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    std::printf("%.3f ms, flags %u\n", taken.count(), quality.flags);  // the sum of MSA2NET_CONTRAST and so on
    masks.write(mask.data(), static_cast<std::streamsize>(mask.size()));
  }
  if (!masks.flush()) return wrong("MASKS cannot be written", "Check the disk.");
  if (!frames.eof() || frames.gcount()) return wrong("FRAMES ends within a frame", "Check ROWS, COLUMNS, CHANNELS.");
  return MSA2NET_OK;
}
