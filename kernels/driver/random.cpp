// libcurand as far as opening a candle device needs it: generators that candle seeds. hone draws its own numbers.
#include <random>

#include "device.h"

using namespace fake;

#define API EXPORT int

namespace {

std::mt19937_64& generator(void* handle) { return *static_cast<std::mt19937_64*>(handle); }

}  // namespace

API curandCreateGenerator(void** handle, int) {
    *handle = new std::mt19937_64(1);
    return success;
}
API curandDestroyGenerator(void* handle) {
    delete static_cast<std::mt19937_64*>(handle);
    return success;
}
API curandSetStream(void*, void*) { return success; }
API curandSetPseudoRandomGeneratorSeed(void* handle, unsigned long long seed) {
    generator(handle).seed(seed);
    return success;
}
API curandSetGeneratorOffset(void*, unsigned long long) { return success; }
API curandGenerateUniform(void* handle, float* to, size_t count) {
    for (size_t i = 0; i < count; ++i) to[i] = 1.0f - static_cast<float>(generator(handle)() >> 40) * 0x1p-24f;  // (0, 1]
    return success;
}
API curandGenerateNormal(void* handle, float* to, size_t count, float mean, float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    for (size_t i = 0; i < count; ++i) to[i] = normal(generator(handle));
    return success;
}
