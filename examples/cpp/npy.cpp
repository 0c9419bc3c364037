#include "npy.h"

#include <cstring>
#include <fstream>
#include <stdexcept>

namespace {

constexpr char kMagic[] = "\x93NUMPY";

[[noreturn]] void fail(const std::string& path, const std::string& why) {
  throw std::runtime_error(path + ": " + why);
}

// What stands between `begin` and `end` in the header, a Python dict as NumPy prints it.
std::string between(const std::string& path, const std::string& header, const std::string& begin,
                    char end) {
  const size_t first = header.find(begin);
  if (first == std::string::npos) fail(path, "no " + begin + " in the header");
  const size_t last = header.find(end, first + begin.size());
  if (last == std::string::npos) fail(path, "the header is cut off");
  return header.substr(first + begin.size(), last - first - begin.size());
}

std::vector<int64_t> parse_shape(const std::string& text) {
  std::vector<int64_t> shape;
  size_t position = 0;
  while ((position = text.find_first_of("0123456789", position)) != std::string::npos) {
    size_t length = 0;
    shape.push_back(std::stoll(text.substr(position), &length));
    position += length;
  }
  return shape;
}

}  // namespace

int64_t Array::num_elements() const {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

Array read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, "cannot be opened");
  unsigned char start[8];
  file.read(reinterpret_cast<char*>(start), sizeof(start));
  if (!file || std::memcmp(start, kMagic, 6) != 0) fail(path, "is no .npy file");
  const int length_bytes = start[6] == 1 ? 2 : 4;
  unsigned char raw[4] = {};
  file.read(reinterpret_cast<char*>(raw), length_bytes);
  const size_t length = raw[0] | raw[1] << 8 | raw[2] << 16 | static_cast<size_t>(raw[3]) << 24;
  std::string header(length, ' ');
  file.read(&header[0], static_cast<std::streamsize>(length));
  if (!file) fail(path, "the header is cut off");

  Array array;
  array.dtype = between(path, header, "'descr': '", '\'');
  if (array.dtype != "<f4" && array.dtype != "<f8" && array.dtype != "<i8") {
    fail(path, "dtype must be float32, float64 or int64, got " + array.dtype);
  }
  if (header.find("'fortran_order': False") == std::string::npos) {
    fail(path, "must be in C order");
  }
  array.shape = parse_shape(between(path, header, "'shape': (", ')'));
  array.bytes.resize(static_cast<size_t>(array.num_elements() * array.element_size()));
  file.read(array.bytes.data(), static_cast<std::streamsize>(array.bytes.size()));
  if (!file) fail(path, "has fewer elements than its header says");
  return array;
}

void write_npy(const std::string& path, const Array& array) {
  std::string shape;
  for (const int64_t size : array.shape) shape += std::to_string(size) + ", ";
  std::string header =
      "{'descr': '" + array.dtype + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  constexpr size_t kPrefix = 10, kAlignment = 64;
  header.resize((kPrefix + header.size()) / kAlignment * kAlignment + kAlignment - kPrefix, ' ');
  header.back() = '\n';
  std::ofstream file(path, std::ios::binary);
  file.write(kMagic, 6);
  const char rest[4] = {1, 0, static_cast<char>(header.size() & 0xff),
                        static_cast<char>(header.size() >> 8)};
  file.write(rest, sizeof(rest));
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(array.bytes.data(), static_cast<std::streamsize>(array.bytes.size()));
  if (!file) fail(path, "cannot be written");
}
