__version__ = "0.1.0"

# ultramem::kApiVersion of csrc/include/ultramem/version.h: what these Python files ask of the
# native library.
NATIVE_API_VERSION = 6
