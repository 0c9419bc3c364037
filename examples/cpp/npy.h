// Arrays in NumPy's .npy files (format versions 1 and 2, little-endian, C order).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Array {
  std::string dtype;  // "<f4", "<f8" or "<i8"
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  int64_t element_size() const { return dtype == "<f4" ? 4 : 8; }
  int64_t num_elements() const;
};

// Throw std::runtime_error, naming the file.
Array read_npy(const std::string& path);
void write_npy(const std::string& path, const Array& array);
