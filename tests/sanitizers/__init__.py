"""The C++ library and the emulated CUDA kernels under AddressSanitizer, UBSan and ThreadSanitizer."""
