// See msa2net.h. The steps and their order are those of runtimes/BUNDLE.md, section 3.
#include "msa2net.h"

#include <dirent.h>
#include <fcntl.h>
#include <malloc.h>
#include <openssl/evp.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <locale>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <openvino/openvino.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#ifdef __FAST_MATH__
#error "-ffast-math and -Ofast take out the check that the network's output is finite: leave them out for this file"
#endif

namespace {

using Json = nlohmann::json;
using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kMostBytes = std::size_t{1} << 20;  // of the sums and of the manifest
constexpr std::size_t kMostGraph = std::size_t{1} << 28;
constexpr int kMostDepth = 32;  // of the manifest
constexpr std::int32_t kMostSide = 32768;
const std::string kSums = "SHA256SUMS", kManifest = "manifest.json";
const std::string kCopy = "Copy the bundle anew.", kExport = "Export the model again.";

thread_local char last_error[2048];

// One line of ASCII, whatever a file's name or a library's message held; it allocates nothing: memory may be short.
void say(const char* before, const char* text, const char* after) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s%s%s", before, text, after);
  for (char* at = last_error; *at; ++at) {
    const auto c = static_cast<unsigned char>(*at);
    if (c < 0x20 || c == 0x7f) *at = ' ';
    if (c > 0x7f) *at = '?';
  }
}

struct Failure {
  int code;
  std::string text;
};

[[noreturn]] void fail(int code, const std::string& place, const std::string& found, const std::string& expected,
                       const std::string& advice) {
  std::string text = place + ": " + found + (expected.empty() ? "" : ", expected " + expected) + ". " + advice;
  throw Failure{code, text};
}

[[noreturn]] void refuse(const std::string& place, const std::string& found, const std::string& expected,
                         const std::string& advice = kCopy) {
  fail(MSA2NET_BUNDLE, place, found, expected, advice);
}

// A file, or a folder, that the system does not give: the bundle's fault only where it is not there, or no file.
[[noreturn]] void refuse_access(const std::string& place, const std::string& expected) {
  const int reason = errno;
  const bool bundle = reason == ENOENT || reason == ENOTDIR || reason == ELOOP || reason == EIO;
  fail(bundle ? MSA2NET_BUNDLE : MSA2NET_UNAVAILABLE, place,
       std::string("cannot be read (") + std::strerror(reason) + ")", expected,
       bundle ? kCopy : "Check its permissions, and the limits of the process.");
}

std::string digits(double value) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.9g", value);
  return text.data();
}

std::string joined(const std::set<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "nothing" : text;
}

// Files ----------------------------------------------------------------------------------------------------------

class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  int get() const { return value_; }

 private:
  int value_;
};

Descriptor open_file(int folder, const std::string& path) {
  Descriptor file(::openat(folder, path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) refuse_access(path, "a readable file");
  struct stat about{};
  if (::fstat(file.get(), &about) != 0 || !S_ISREG(about.st_mode)) refuse(path, "is no file", "a regular file");
  return file;
}

// Hands a file's bytes, from its start, to `use`, piece by piece.
template <typename Use>
void read_pieces(const Descriptor& file, const std::string& path, const Use& use) {
  std::array<std::uint8_t, 1 << 14> buffer;  // a caller's thread may have a small stack
  for (off_t at = 0;;) {
    const ssize_t got = ::pread(file.get(), buffer.data(), buffer.size(), at);
    if (got < 0) refuse_access(path, "a readable file");
    if (got == 0) return;
    use(buffer.data(), static_cast<std::size_t>(got));
    at += got;
  }
}

Bytes read_all(const Descriptor& file, const std::string& path, std::size_t most) {
  Bytes content;
  struct stat about{};  // else a vector that grows needs three times the file
  if (::fstat(file.get(), &about) == 0) content.reserve(std::min(static_cast<std::size_t>(about.st_size), most));
  read_pieces(file, path, [&](const std::uint8_t* data, std::size_t size) {
    content.insert(content.end(), data, data + size);
    if (content.size() > most) refuse(path, "has over " + std::to_string(most) + " bytes", "fewer");
  });
  return content;
}

Descriptor open_folder(const char* path) {
  Descriptor folder(::open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() < 0) refuse(path, std::strerror(errno), "a bundle's folder", "Check the path.");
  return folder;
}

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1)
      fail(MSA2NET_UNAVAILABLE, "SHA-256", "OpenSSL cannot compute it", "", "Check its installation.");
  }
  void add(const std::uint8_t* data, std::size_t size) { EVP_DigestUpdate(context_.get(), data, size); }
  std::string hex() {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
    unsigned size = 0;
    EVP_DigestFinal_ex(context_.get(), digest.data(), &size);
    std::string text;
    for (unsigned i = 0; i < size; ++i) {
      text += "0123456789abcdef"[digest[i] >> 4];
      text += "0123456789abcdef"[digest[i] & 15];
    }
    return text;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

std::string digest_of(const Bytes& content) {
  Sha256 digest;
  digest.add(content.data(), content.size());
  return digest.hex();
}

void require_digest(const std::string& path, const std::string& found, const std::string& expected) {
  if (found != expected) refuse(path, "changed: SHA-256 " + found.substr(0, 12), expected.substr(0, 12));
}

void require_size(const std::string& path, std::size_t found, std::int64_t expected) {
  if (static_cast<std::int64_t>(found) != expected)
    refuse(path, "has " + std::to_string(found) + " bytes", std::to_string(expected) + " as in the manifest", kExport);
}

// The files below a folder, links, devices and hard links refused.
void list_files(int folder, const std::string& prefix, std::set<std::string>& found) {
  const int again = ::openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* const opened = again < 0 ? nullptr : ::fdopendir(again);
  if (!opened) {
    const int reason = errno;
    if (again >= 0) ::close(again);
    errno = reason;
    refuse_access(prefix.empty() ? "the bundle" : prefix, "a readable folder");
  }
  const std::unique_ptr<DIR, int (*)(DIR*)> closing(opened, ::closedir);
  errno = 0;
  while (const dirent* entry = ::readdir(opened)) {
    const std::string name = entry->d_name, path = prefix + name;
    if (name == "." || name == "..") continue;
    struct stat about{};
    if (::fstatat(folder, name.c_str(), &about, AT_SYMLINK_NOFOLLOW) != 0)
      refuse(path, std::strerror(errno), "a file or a folder");
    if (S_ISREG(about.st_mode)) {
      if (about.st_nlink > 1) refuse(path, "is a hard link", "a file without another name");
      found.insert(path);
    } else if (S_ISDIR(about.st_mode)) {
      const Descriptor inner(::openat(folder, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
      if (inner.get() < 0) refuse_access(path, "a readable folder");
      list_files(inner.get(), path + "/", found);
    } else {
      refuse(path, "is a link or a device", "only regular files");
    }
    errno = 0;
  }
  if (errno != 0) refuse(prefix.empty() ? "the bundle" : prefix, std::strerror(errno), "a readable folder");
}

// SHA256SUMS and the manifest ------------------------------------------------------------------------------------

std::map<std::string, std::string> parse_sums(const Bytes& content) {
  std::map<std::string, std::string> sums;
  const std::string text(content.begin(), content.end());
  std::size_t number = 1;
  for (std::size_t start = 0; start < text.size(); ++number) {
    const std::size_t end = text.find('\n', start);
    const std::string place = kSums + " line " + std::to_string(number);
    if (end == std::string::npos) refuse(place, "has no end", "whole lines");
    const std::string line = text.substr(start, end - start);
    start = end + 1;
    const bool hex = line.size() > 66 && std::all_of(line.begin(), line.begin() + 64, [](char c) {
                       return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
                     });
    if (!hex || line.compare(64, 2, "  ") != 0) refuse(place, "is no sum", "'<64 hex digits>  <path>'");
    const std::string path = line.substr(66);
    bool inside = path != kSums;
    for (std::size_t at = 0; inside && at <= path.size();) {
      const std::size_t slash = std::min(path.find('/', at), path.size());
      const std::string part = path.substr(at, slash - at);
      inside = !part.empty() && part != "." && part != "..";
      at = slash + 1;
    }
    inside = inside && std::none_of(path.begin(), path.end(),
                                    [](unsigned char c) { return c < 0x20 || c == 0x7f || c == '\\' || c == ':'; });
    if (!inside) refuse(place, "names '" + path + "'", "a file inside the bundle");
    if (!sums.emplace(path, line.substr(0, 64)).second) refuse(place, "names '" + path + "' again", "each file once");
  }
  if (!sums.count(kManifest)) refuse(kSums, "no line for " + kManifest, "one");
  return sums;
}

Json parse_json(const Bytes& content) {
  std::vector<std::set<std::string>> names;
  const Json::parser_callback_t check = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > kMostDepth) refuse(kManifest, "its objects lie too deep in each other", "32 at most", kExport);
    if (event == Json::parse_event_t::object_start) names.emplace_back();
    if (event == Json::parse_event_t::object_end) names.pop_back();
    if (event == Json::parse_event_t::key && !names.back().insert(value.get<std::string>()).second)
      refuse(kManifest, "an object has one field twice", "each once", kExport);
    return true;
  };
  return Json::parse(content.begin(), content.end(), check);
}

struct Golden {
  std::string frame, logits, mask;
};

struct Artifact {
  std::string xml, weights, rest;
  std::int64_t xml_bytes = 0, weights_bytes = 0;
  std::vector<std::string> outputs;
  double logit_tolerance = 0, pixel_tolerance = 0;
};

struct Manifest {
  std::vector<std::string> classes;
  std::int64_t height = 0, width = 0;
  bool letterbox = false;
  std::vector<std::array<double, 2>> limits;  // least and most of each figure of quality, or none
  std::vector<Golden> golden;
  Artifact artifact;
};

const std::string& listed(const std::map<std::string, std::string>& sums, const std::string& path) {
  const auto found = sums.find(path);
  if (found == sums.end()) refuse(kManifest, "names the file '" + path + "'", "one listed in " + kSums, kExport);
  return found->second;
}

double limit_within(const Json& value, double most) {
  const double number = value.get<double>();
  if (!value.is_number() || !(number >= 0 && number <= most))
    refuse(kManifest, "got a limit of " + value.dump(), "a number from 0 to " + digits(most), kExport);
  return number;
}

std::int64_t whole(const Json& value, const std::string& name) {
  if (!value.is_number_integer()) refuse(kManifest, name + " is " + value.dump(), "a whole number", kExport);
  return value.get<std::int64_t>();
}

std::vector<std::string> class_names(const Json& classes) {
  std::vector<std::string> names;
  for (const Json& each : classes) {
    names.push_back(each.at("name").get<std::string>());
    const std::string& name = names.back();
    const bool plain =
        !name.empty() && std::none_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
    if (!plain || std::count(names.begin(), names.end(), name) > 1)
      refuse(kManifest, "got a class named '" + name + "'", "names in one line, each once", kExport);
  }
  if (names.size() < 2 || names.size() > 256)
    refuse(kManifest, std::to_string(names.size()) + " classes", "2 to 256", kExport);
  return names;
}

// Of a baked graph: logits and mask, and after them confidence, colors or both.
std::vector<std::string> output_names(const Json& outputs) {
  const std::vector<std::string> names = outputs.get<std::vector<std::string>>();
  const std::vector<std::string> all{"logits", "mask", "confidence", "colors"};
  auto left = all.begin();
  bool ordered = true;
  for (const std::string& name : names) {
    left = std::find(left, all.end(), name);
    if (!(ordered = left != all.end())) break;
    ++left;
  }
  if (!ordered || names.size() < 2 || names[0] != all[0] || names[1] != all[1])
    refuse(kManifest, "a graph's outputs are " + outputs.dump(), "logits, mask, then confidence, colors or both",
           kExport);
  return names;
}

std::string sides(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t side : shape) text += (text.empty() ? "" : " x ") + std::to_string(side);
  return text;
}

Manifest parse_manifest(const Json& root, const std::map<std::string, std::string>& sums, const std::string& precision,
                        const std::vector<std::int64_t>& shape) {
  const std::string version = root.at("schema_version").get<std::string>();
  const bool known = version.size() > 2 && version.size() < 7 &&
                     (version.rfind("3.", 0) == 0 || version.rfind("4.", 0) == 0) &&
                     std::all_of(version.begin() + 2, version.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!known) refuse(kManifest, "got schema version " + version, "3.x or 4.x", "Install the library of that version.");
  Manifest manifest;
  manifest.height = whole(root.at("input").at("height"), "height");
  manifest.width = whole(root.at("input").at("width"), "width");
  const std::string fit = root.at("input").at("fit").get<std::string>();
  if (fit != "stretch" && fit != "letterbox") refuse(kManifest, "the fit is " + fit, "stretch or letterbox", kExport);
  manifest.letterbox = fit == "letterbox";
  manifest.classes = class_names(root.at("classes"));
  if (root.contains("quality"))
    for (const char* const name : {"contrast", "saturation", "margin", "border", "area"}) {
      const Json& limits = root.at("quality").at("limits").at(name);
      if (limits.size() != 2)
        refuse(kManifest, std::string("the limits of ") + name + " are " + limits.dump(), "two", kExport);
      manifest.limits.push_back({limit_within(limits.at(0), 1), limit_within(limits.at(1), 1)});
    }
  for (const Json& each : root.at("golden"))
    manifest.golden.push_back({each.at("frame").get<std::string>(), each.at("logits").get<std::string>(),
                               each.at("mask").get<std::string>()});
  bool there = false, baked = false;
  for (const Json& each : root.at("artifacts")) {
    if (each.at("runtime") != "openvino" || each.at("precision") != precision) continue;
    if (std::exchange(there, true)) refuse(kManifest, "openvino " + precision + " is there twice", "once", kExport);
    const std::string verdict = each.at("parity").at("verdict").get<std::string>();
    if (verdict != "high" && verdict != "standard" && !(verdict == "unjudged" && precision == "fp32"))
      refuse("openvino " + precision, "its accuracy check at export says " + verdict, "one that passed", kExport);
    for (const Json& graph : each.value("baked", Json::array())) {
      if (graph.at("frame").get<std::vector<std::int64_t>>() != shape) continue;
      if (std::exchange(baked, true))
        refuse(kManifest, "openvino " + precision + " has two graphs for frames of " + sides(shape), "one", kExport);
      const Json& files = graph.at("files");
      Artifact& artifact = manifest.artifact;
      artifact.xml = files.at(0).at("path").get<std::string>();
      artifact.weights = files.at(1).at("path").get<std::string>();
      artifact.xml_bytes = whole(files.at(0).at("bytes"), "bytes");
      artifact.weights_bytes = whole(files.at(1).at("bytes"), "bytes");
      artifact.rest = each.value("rest", std::string("fp32"));
      if (artifact.rest != "fp32" && artifact.rest != "bf16")
        refuse(kManifest, "the rest of int8 is in " + artifact.rest, "fp32 or bf16", kExport);
      artifact.outputs = output_names(graph.at("outputs"));
      artifact.logit_tolerance = limit_within(each.at("tolerance").at("logit"), 1e6);
      artifact.pixel_tolerance = limit_within(each.at("tolerance").at("pixels"), 1);
      for (const Json& file : {files.at(0), files.at(1)})
        if (listed(sums, file.at("path").get<std::string>()) != file.at("sha256").get<std::string>())
          refuse(file.at("path").get<std::string>(), "its sums in manifest and " + kSums + " differ", "the same",
                 kExport);
    }
  }
  if (!baked)
    fail(MSA2NET_ARGUMENT, "openvino " + precision,
         there ? "nothing is baked for frames of " + sides(shape) : "the bundle has no such artifact",
         "a size and precision of the bundle", "Export with --bake.");
  return manifest;
}

// The weights, in the very memory that the runtime takes them from, and held against their sum there.
ov::Tensor read_weights(const Descriptor& file, const std::string& path, const std::string& sum) {
  struct stat about{};
  if (::fstat(file.get(), &about) != 0) refuse_access(path, "a readable file");
  ov::Tensor weights(ov::element::u8, {static_cast<std::size_t>(about.st_size)});
  std::size_t filled = 0;
  read_pieces(file, path, [&](const std::uint8_t* data, std::size_t size) {
    if (size > weights.get_size() - filled) refuse(path, "grows while it is read", "a file that nobody writes");
    std::memcpy(weights.data<std::uint8_t>() + filled, data, size);
    filled += size;
  });
  Sha256 digest;
  digest.add(weights.data<std::uint8_t>(), filled);
  require_digest(path, digest.hex(), sum);
  return weights;
}

// Of numpy's format 1.0, row-major and little-endian: where the data begins. BUNDLE.md, section 8.
const std::uint8_t* npy(const Bytes& content, const std::string& path, const std::string& type,
                        const std::vector<std::int64_t>& shape, std::size_t bytes) {
  const std::string magic("\x93NUMPY\x01\x00", 8);
  const bool known = content.size() > 10 && std::equal(magic.begin(), magic.end(), content.begin(),
                                                       [](char a, std::uint8_t b) { return std::uint8_t(a) == b; });
  const std::size_t start = known ? 10 + content[8] + 256 * content[9] : 0;
  if (!known || content.size() < start) refuse(path, "is no .npy file", "numpy's format 1.0");
  std::string header(content.begin() + 10, content.begin() + static_cast<std::ptrdiff_t>(start)), sides;
  for (const std::int64_t side : shape) sides += std::to_string(side) + ",";
  header.erase(std::remove(header.begin(), header.end(), ' '), header.end());
  if (shape.size() > 1) sides.pop_back();
  const bool fits = header.find("'descr':'" + type + "'") != std::string::npos &&
                    header.find("'fortran_order':False") != std::string::npos &&
                    header.find("'shape':(" + sides + ")") != std::string::npos && content.size() == start + bytes;
  return fits ? content.data() + start : nullptr;
}

// What the CPU computes in, as msa2net.runtimes.backends asks it.
bool cpu_has_int8() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni");
#elif defined(__aarch64__)
  return ::getauxval(AT_HWCAP) & (1UL << 20);  // HWCAP_ASIMDDP
#else
  return false;
#endif
}

bool cpu_has_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  return ::getauxval(AT_HWCAP2) & (1UL << 14);  // HWCAP2_BF16
#else
  return false;
#endif
}

// An IR holds OpenVINO's own operators and asks for no other file: as runtimes/graphs.py has it.
void require_plain(const std::string& path, const std::string& text) {
  const std::string plain = "a plain IR in UTF-8";
  const auto name_char = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-' || c == '.';
  };
  std::size_t at = text.rfind("<?xml", 0) == 0 ? text.find("?>") : 0;
  bool rooted = false;
  if (text.find('\0') != std::string::npos || at == std::string::npos) refuse(path, "is no XML", plain, kExport);
  while ((at = text.find('<', at)) != std::string::npos) {
    if (text.compare(at, 4, "<!--") == 0) {
      at = text.find("-->", at + 4);
      if (at == std::string::npos) refuse(path, "has half a comment", plain, kExport);
      continue;
    }
    if (text.compare(at, 2, "<!") == 0 || text.compare(at, 2, "<?") == 0)
      refuse(path, "declares a document type or an entity", plain, kExport);
    if (text.compare(at, 2, "</") == 0) {
      ++at;
      continue;
    }
    std::size_t end = ++at;
    while (end < text.size() && name_char(text[end])) ++end;
    const std::string tag = text.substr(at, end - at);
    if (!rooted && tag != "net") refuse(path, "is no IR", plain, kExport);
    rooted = true;
    std::map<std::string, std::string> attributes;
    for (at = end;;) {
      while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
      if (at >= text.size()) refuse(path, "has half an element", plain, kExport);
      if (text[at] == '>' || text[at] == '/') break;
      for (end = at; end < text.size() && name_char(text[end]);) ++end;
      const std::string name = text.substr(at, end - at);
      for (at = end; at < text.size() && (text[at] == '=' || std::isspace(static_cast<unsigned char>(text[at])));) ++at;
      const std::size_t close =
          at < text.size() && (text[at] == '"' || text[at] == '\'') ? text.find(text[at], at + 1) : std::string::npos;
      if (name.empty() || close == std::string::npos)
        refuse(path, "uses XML namespaces, or is damaged", plain, kExport);
      if (!attributes.emplace(name, text.substr(at + 1, close - at - 1)).second)
        refuse(path, "has an attribute twice", plain, kExport);
      at = close + 1;
    }
    if (attributes.count("xmlns")) refuse(path, "uses XML namespaces, or is damaged", plain, kExport);
    if (tag == "data" && attributes.count("path")) refuse(path, "asks for another file", plain, kExport);
    const std::string& version = attributes["version"];
    const bool own = version.rfind("opset", 0) == 0 && version.size() > 5 && version.size() < 8 &&
                     std::all_of(version.begin() + 5, version.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (tag == "layer" && !own) refuse(path, "has a layer that is not OpenVINO's own", plain, kExport);
  }
  if (!rooted) refuse(path, "is no IR", plain, kExport);
}

// What loading and testing needed and no frame needs any more: glibc would keep it for good.
void give_memory_back() {
#if defined(__GLIBC__)
  ::malloc_trim(0);
#endif
}

// OpenVINO before 2026 reads the numbers of a graph as the program's locale writes them: 1e-06 with a comma is another.
void require_point() {
  const char point = std::use_facet<std::numpunct<char>>(std::locale()).decimal_point();
  if (point != '.')
    fail(MSA2NET_UNAVAILABLE, "std::locale::global", std::string("numbers have a '") + point + "'", "a '.'",
         "Set it after msa2net_open, or imbue the streams that need it.");
}

// OpenVINO wraps what it catches.
bool is_short_of_memory(const std::exception& error) {
  return dynamic_cast<const std::bad_alloc*>(&error) || std::strstr(error.what(), "bad_alloc");
}

template <typename Call>
int guarded(const Call& call) noexcept {
  try {
    last_error[0] = '\0';
    call();
    return MSA2NET_OK;
  } catch (const Failure& failure) {
    say("", failure.text.c_str(), "");
    return failure.code;
  } catch (const Json::exception& error) {
    say("manifest.json: ", error.what(), ", expected what BUNDLE.md says. Export the model again.");
    return MSA2NET_BUNDLE;
  } catch (const std::exception& error) {
    if (is_short_of_memory(error)) {
      say("memory: ", "there is not enough", ". Free some, or take a smaller model.");
      return MSA2NET_UNAVAILABLE;
    }
    say("runtime: failed (", error.what(), "). Verify the bundle on this device.");
    return MSA2NET_OUTPUT;
  } catch (...) {
    say("runtime: ", "failed", ". Verify the bundle on this device.");
    return MSA2NET_OUTPUT;
  }
}

}  // namespace

struct msa2net {
  std::string digest;
  Manifest manifest;
  std::vector<std::int64_t> shape;
  std::map<std::string, std::string> sums;
  Descriptor folder;
  const pid_t process = ::getpid();
  std::mutex mutex;
  ov::Core core;
  ov::CompiledModel compiled;
  ov::InferRequest request;

  msa2net(const char* bundle, const std::string& precision, std::vector<std::int64_t> frame, int threads)
      : shape(std::move(frame)), folder(open_folder(bundle)) {
    const Bytes content = read_all(open_file(folder.get(), kSums), kSums, kMostBytes);
    digest = digest_of(content);
    sums = parse_sums(content);
    std::set<std::string> present;
    list_files(folder.get(), "", present);
    present.erase(kSums);
    for (const auto& [path, sum] : sums)
      if (!present.count(path)) refuse("the bundle", "missing " + path, "exactly the files of " + kSums);
    for (const std::string& path : present)
      if (!sums.count(path)) refuse("the bundle", "extra " + path, "exactly the files of " + kSums);
    manifest = parse_manifest(parse_json(checked(kManifest, kMostBytes)), sums, precision, shape);
    load(precision, threads);
  }

  // The bytes of a file whose digest holds.
  Bytes checked(const std::string& path, std::size_t most = std::size_t{1} << 32) const {
    Bytes content = read_all(open_file(folder.get(), path), path, most);
    require_digest(path, digest_of(content), listed(sums, path));
    return content;
  }

  void load(const std::string& precision, int threads) {
    const Artifact& artifact = manifest.artifact;
    const bool int8 = precision.rfind("int8", 0) == 0;
    if (precision == "int8" && !cpu_has_int8())
      fail(MSA2NET_UNAVAILABLE, "openvino int8", "this CPU would cut off sums", "one with VNNI", "Use int8-portable.");
    if (precision == "bf16" && !cpu_has_bf16())
      fail(MSA2NET_UNAVAILABLE, "openvino bf16", "this CPU has no AVX512_BF16", "one that has", "Use fp32.");
    const bool bf16 = precision == "bf16" || (int8 && artifact.rest == "bf16" && cpu_has_bf16());
    require_point();
    // The runtime is given the very bytes that were held against their sums: a file may change at any time.
    const Bytes content = checked(artifact.xml, kMostGraph);
    const std::string graph(content.begin(), content.end());
    require_plain(artifact.xml, graph);
    const ov::Tensor weights =
        read_weights(open_file(folder.get(), artifact.weights), artifact.weights, listed(sums, artifact.weights));
    require_size(artifact.xml, graph.size(), artifact.xml_bytes);
    require_size(artifact.weights, weights.get_byte_size(), artifact.weights_bytes);
    ov::AnyMap config{{ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)},
                      {ov::hint::inference_precision(bf16 ? ov::element::bf16 : ov::element::f32)}};
    if (threads > 0) config.insert(ov::inference_num_threads(threads));
    try {
      compiled = core.compile_model(core.read_model(graph, weights), "CPU", config);
    } catch (const std::exception& error) {
      if (is_short_of_memory(error)) throw;
      fail(MSA2NET_UNAVAILABLE, "openvino " + precision, std::string("cannot be loaded (") + error.what() + ")",
           "a graph that this OpenVINO runs", "Update OpenVINO, or export again.");
    }
    require_ends();
    require_precision(precision, bf16);
    give_memory_back();
    request = compiled.create_infer_request();
  }

  // In one process only: a child has none of the runtime's threads, and may wait for ever for the mutex.
  void require_own_process() const {
    if (::getpid() != process)
      fail(MSA2NET_UNAVAILABLE, "model", "was opened before a fork", "the process that opened it",
           "Open it in the child.");
  }

  // Of the network's own layers, by what the runtime says it executes; baking adds some in uint8 and fp32.
  void require_precision(const std::string& precision, bool bf16) {
    std::set<std::string> found, computed;  // what is only moved proves nothing
    for (const auto& node : compiled.get_runtime_model()->get_ordered_ops()) {
      const ov::RTMap& info = node->get_rt_info();
      const auto said = info.find("runtimePrecision"), names = info.find("originalLayersNames");
      const auto kind = info.find("layerType");
      if (said == info.end() || names == info.end() || kind == info.end()) continue;
      const std::string type = kind->second.as<std::string>();
      if (type != "Input" && type != "Output" && type != "Const" && !added(names->second.as<std::string>()))
        (type == "Reorder" || type == "Reshape" ? found : computed).insert(said->second.as<std::string>());
    }
    found.insert(computed.begin(), computed.end());
    const bool lower = found.count("i8") || found.count("u8") || found.count("bf16") || found.count("f16");
    const bool eight = computed.count("i8") || computed.count("u8");
    const bool agree =
        precision == "fp32" ? !lower && !computed.empty() : (precision == "bf16" ? computed.count("bf16") > 0 : eight);
    const auto hint = bf16 ? ov::element::bf16 : ov::element::f32;
    if (!agree || compiled.get_property(ov::hint::inference_precision) != hint)
      fail(MSA2NET_UNAVAILABLE, "openvino " + precision, "computes in " + joined(computed) + " on this device",
           precision, "Use fp32, or another OpenVINO.");
  }

  // Whether a layer was made of nothing but what baking adds; `names` are separated by commas.
  bool added(const std::string& names) const {
    const auto& outputs = manifest.artifact.outputs;
    for (std::size_t at = 0; at < names.size();) {
      const std::size_t comma = std::min(names.find(',', at), names.size());
      const std::string name = names.substr(at, comma - at);
      const bool end = name == "image" || std::find(outputs.begin() + 1, outputs.end(), name) != outputs.end();
      if (!end && name.rfind("baked.", 0) != 0) return false;
      at = comma + 1;
    }
    return !names.empty();
  }

  void require_ends() const {
    const std::size_t rows = static_cast<std::size_t>(shape[0]), columns = static_cast<std::size_t>(shape[1]);
    const ov::Shape frame(shape.begin(), shape.end()), mask{rows, columns};
    const ov::Shape logits{1, manifest.classes.size(), static_cast<std::size_t>(manifest.height),
                           static_cast<std::size_t>(manifest.width)};
    bool fits = compiled.inputs().size() == 1 && compiled.input().get_element_type() == ov::element::u8 &&
                compiled.input().get_shape() == frame &&
                compiled.outputs().size() == manifest.artifact.outputs.size() &&
                compiled.output(0).get_element_type() == ov::element::f32 && compiled.output(0).get_shape() == logits;
    for (std::size_t i = 1; fits && i < compiled.outputs().size(); ++i) {
      const bool colors = manifest.artifact.outputs[i] == "colors";
      fits = compiled.output(i).get_element_type() == ov::element::u8 &&
             compiled.output(i).get_shape() == (colors ? ov::Shape{rows, columns, 3} : mask);
    }
    if (!fits) refuse(manifest.artifact.xml, "has other inputs or outputs", "those of the manifest", kExport);
  }

  std::size_t frame_bytes() const { return ov::shape_size(compiled.input().get_shape()); }
  std::size_t mask_bytes() const { return static_cast<std::size_t>(shape[0] * shape[1]); }

  std::size_t output(const std::string& name) const {
    const auto& names = manifest.artifact.outputs;
    return static_cast<std::size_t>(std::find(names.begin(), names.end(), name) - names.begin());
  }

  // Runs a frame; the outputs are the request's, until the next. The caller holds the mutex.
  void infer(const std::uint8_t* frame) {
    // OpenVINO takes no const memory, and writes to none of an input's.
    request.set_input_tensor(
        ov::Tensor(ov::element::u8, compiled.input().get_shape(), const_cast<std::uint8_t*>(frame)));
    request.infer();
    const ov::Tensor logits = request.get_output_tensor(0);
    const float* const values = logits.data<const float>();
    if (!std::all_of(values, values + logits.get_size(), [](float value) { return std::isfinite(value); }))
      fail(MSA2NET_OUTPUT, "logits", "NaN or infinity", "finite values", "Verify the bundle on this device.");
    const std::uint8_t* const mask = bytes_of(1);
    if (*std::max_element(mask, mask + mask_bytes()) >= manifest.classes.size())
      fail(MSA2NET_OUTPUT, "mask", "a class that there is not", "those of the manifest", "Verify the bundle.");
  }

  const std::uint8_t* bytes_of(std::size_t index) { return request.get_output_tensor(index).data<std::uint8_t>(); }

  // Where the frame lies in the network's input: first row, first column, rows, columns. BUNDLE.md, section 6.
  std::array<std::int64_t, 4> placement() const {
    const std::int64_t height = manifest.height, width = manifest.width;
    if (!manifest.letterbox) return {0, 0, height, width};
    const double rows = static_cast<double>(shape[0]), columns = static_cast<double>(shape[1]);
    const double scale = std::min(static_cast<double>(height) / rows, static_cast<double>(width) / columns);
    const std::int64_t tall = std::max(std::int64_t{1}, static_cast<std::int64_t>(std::nearbyint(rows * scale)));
    const std::int64_t wide = std::max(std::int64_t{1}, static_cast<std::int64_t>(std::nearbyint(columns * scale)));
    return {(height - tall) / 2, (width - wide) / 2, tall, wide};
  }

  // The mean over the placed pixels of the largest softmax less the second. The logits are the request's.
  double margin() {
    const auto [top, left, tall, wide] = placement();
    const float* const logits = request.get_output_tensor(0).data<const float>();
    const std::int64_t plane = manifest.height * manifest.width;
    const std::int64_t classes = static_cast<std::int64_t>(manifest.classes.size());
    double total = 0;
    for (std::int64_t row = top; row < top + tall; ++row)
      for (std::int64_t at = row * manifest.width + left; at < row * manifest.width + left + wide; ++at) {
        float best = logits[at], second = logits[at + plane];
        if (second > best) std::swap(best, second);
        for (std::int64_t k = 2; k < classes; ++k) {
          second = std::max(second, std::min(best, logits[at + k * plane]));
          best = std::max(best, logits[at + k * plane]);
        }
        double sum = 0;
        for (std::int64_t k = 0; k < classes; ++k) sum += std::exp(static_cast<double>(logits[at + k * plane] - best));
        total += (1 - std::exp(static_cast<double>(second - best))) / sum;
      }
    return total / static_cast<double>(tall * wide);
  }

  // As runtimes/quality.py has it, of the frame and the mask that the request holds.
  msa2net_quality assess(const std::uint8_t* frame) {
    const std::int64_t rows = shape[0], columns = shape[1], channels = shape.size() > 2 ? 3 : 1;
    const std::int64_t down = (rows + 255) / 256, along = (columns + 255) / 256;
    std::int64_t count = 0, sum = 0, squares = 0, white = 0;
    for (std::int64_t row = 0; row < rows; row += down)
      for (std::int64_t column = 0; column < columns; column += along)
        for (std::int64_t i = 0; i < channels; ++i, ++count) {
          const std::int64_t value = frame[(row * columns + column) * channels + i];
          sum += value, squares += value * value, white += value == 255;
        }
    const std::uint8_t* const mask = bytes_of(1);
    std::int64_t inside = 0, edge = 0, at_edge = 0;
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t column = 0; column < columns; ++column) {
        const bool outermost = row == 0 || row == rows - 1 || column == 0 || column == columns - 1;
        const bool found = mask[row * columns + column] != 0;
        inside += found, edge += outermost, at_edge += outermost && found;
      }
    const double n = static_cast<double>(count), mean = static_cast<double>(sum) / n;
    msa2net_quality quality{std::sqrt(std::max(0.0, static_cast<double>(squares) / n - mean * mean)) / 255,
                            static_cast<double>(white) / n,
                            margin(),
                            static_cast<double>(at_edge) / static_cast<double>(edge),
                            static_cast<double>(inside) / static_cast<double>(rows * columns),
                            manifest.limits.empty() ? std::uint32_t{MSA2NET_NO_LIMITS} : 0};
    const double figures[] = {quality.contrast, quality.saturation, quality.margin, quality.border, quality.area};
    for (std::size_t i = 0; i < manifest.limits.size(); ++i)
      if (!(figures[i] >= manifest.limits[i][0] && figures[i] <= manifest.limits[i][1])) quality.flags |= 1U << i;
    return quality;
  }

  // Throws unless the golden frames pass; `report` is what they gave, as far as they came.
  void require_golden(msa2net_report& report) {
    self_test(report);
    if (report.frames == 0) refuse("golden", "no frame is of this size", "one", kExport);
    if (!(report.logit_difference <= report.logit_tolerance) || !(report.pixel_agreement >= report.pixel_tolerance))
      fail(MSA2NET_OUTPUT, "golden frames",
           "a logit differs by " + digits(report.logit_difference) + ", " + digits(100 * report.pixel_agreement) +
               " % of the pixels are equal",
           "at most " + digits(report.logit_tolerance) + " and at least " + digits(100 * report.pixel_tolerance) + " %",
           "Do not use it on this device.");
  }

  void self_test(msa2net_report& report) {
    report = {0, 0, manifest.artifact.logit_tolerance, 1, manifest.artifact.pixel_tolerance};
    const std::vector<std::int64_t> maps{static_cast<std::int64_t>(manifest.classes.size()), manifest.height,
                                         manifest.width};
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Golden& golden : manifest.golden) {
      const Bytes frame = checked(golden.frame);
      const std::uint8_t* const pixels = npy(frame, golden.frame, "|u1", shape, frame_bytes());
      if (!pixels) continue;  // of another size
      const Bytes logits = checked(golden.logits), mask = checked(golden.mask);
      infer(pixels);
      const ov::Tensor first = request.get_output_tensor(0);
      const std::vector<float> before(first.data<const float>(), first.data<const float>() + first.get_size());
      infer(pixels);
      const ov::Tensor found = request.get_output_tensor(0);
      if (std::memcmp(before.data(), found.data<const float>(), found.get_byte_size()) != 0)
        fail(MSA2NET_OUTPUT, "golden frames", "a second run gave other logits", "the same bits",
             "Do not use this precision on this device.");
      const std::uint8_t* const expected = npy(logits, golden.logits, "<f4", maps, found.get_byte_size());
      const std::uint8_t* const wanted = npy(mask, golden.mask, "|u1", {shape[0], shape[1]}, mask_bytes());
      if (!expected || !wanted) refuse(golden.logits, "is of another shape", "the network's", kExport);
      const float* const values = found.data<const float>();
      for (std::size_t i = 0; i < found.get_size(); ++i) {
        float value;
        std::memcpy(&value, expected + i * sizeof value, sizeof value);
        if (!std::isfinite(value)) refuse(golden.logits, "got NaN or infinity", "finite values", kExport);
        const double off = std::abs(static_cast<double>(values[i]) - value);
        report.logit_difference = std::max(report.logit_difference, off);
      }
      const std::uint8_t* const made = bytes_of(1);
      std::size_t equal = 0;
      for (std::size_t i = 0; i < mask_bytes(); ++i) equal += made[i] == wanted[i];
      report.pixel_agreement =
          std::min(report.pixel_agreement, static_cast<double>(equal) / static_cast<double>(mask_bytes()));
      ++report.frames;
    }
  }
};

extern "C" {

int msa2net_open(const char* bundle, const char* precision, int32_t rows, int32_t columns, int32_t channels,
                 int32_t threads, msa2net** model) {
  return guarded([&] {
    if (model) *model = nullptr;
    if (!bundle || !precision || !model)
      fail(MSA2NET_ARGUMENT, "msa2net_open", "a null pointer", "a bundle, a precision and a place", "Give all.");
    if (rows < 1 || columns < 1 || rows > kMostSide || columns > kMostSide || (channels != 1 && channels != 3))
      fail(MSA2NET_ARGUMENT, "msa2net_open",
           "a frame of " + std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(channels),
           "1 to 32768 rows and columns, 1 or 3 channels", "Give those of --bake.");
    const std::string known[] = {"fp32", "bf16", "int8", "int8-portable"};
    if (std::find(std::begin(known), std::end(known), precision) == std::end(known))
      fail(MSA2NET_ARGUMENT, "precision", std::string("got ") + precision, "fp32, bf16, int8 or int8-portable",
           "Check the spelling.");
    if (threads < 0 || threads > 1024)
      fail(MSA2NET_ARGUMENT, "threads", std::to_string(threads), "0 to 1024", "0 takes all that there are.");
    std::vector<std::int64_t> shape{rows, columns};
    if (channels == 3) shape.push_back(3);
    auto opened = std::make_unique<msa2net>(bundle, precision, std::move(shape), threads);
    // int8 has been seen to be right on one CPU and not on another that has the same instructions.
    msa2net_report report;
    if (std::string(precision).rfind("int8", 0) == 0) opened->require_golden(report);
    *model = opened.release();
  });
}

int msa2net_predict(msa2net* model, const uint8_t* frame, uint8_t* mask, uint8_t* confidence,
                    msa2net_quality* quality) {
  return guarded([&] {
    if (!model || !frame || !mask)
      fail(MSA2NET_ARGUMENT, "msa2net_predict", "a null pointer", "a model, a frame and a mask", "Give all.");
    model->require_own_process();
    const std::size_t sure = model->output("confidence");
    if (confidence && sure == model->manifest.artifact.outputs.size())
      fail(MSA2NET_ARGUMENT, "confidence", "the graph gives none", "NULL", "Export with --bake-outputs confidence.");
    const std::lock_guard<std::mutex> lock(model->mutex);
    model->infer(frame);
    if (quality) *quality = model->assess(frame);  // before the mask, which may lie where the frame does
    std::memcpy(mask, model->bytes_of(1), model->mask_bytes());
    if (confidence) std::memcpy(confidence, model->bytes_of(sure), model->mask_bytes());
  });
}

int msa2net_self_test(msa2net* model, msa2net_report* report) {
  return guarded([&] {
    if (!model || !report)
      fail(MSA2NET_ARGUMENT, "msa2net_self_test", "a null pointer", "a model and a report", "Give both.");
    *report = {};
    model->require_own_process();
    model->require_golden(*report);
    give_memory_back();
  });
}

const char* msa2net_digest(const msa2net* model) { return model ? model->digest.c_str() : nullptr; }

const char* msa2net_class_name(const msa2net* model, int32_t index) {
  const bool there = model && index >= 0 && static_cast<std::size_t>(index) < model->manifest.classes.size();
  return there ? model->manifest.classes[static_cast<std::size_t>(index)].c_str() : nullptr;
}

const char* msa2net_last_error(void) { return last_error; }

void msa2net_close(msa2net* model) { delete model; }

}  // extern "C"
