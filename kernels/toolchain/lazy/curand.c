/* Stands for libcurand, 130 MB that hone does not need: candle makes, seeds and frees a generator for every device it opens, and
 * hone draws its random numbers itself. Whatever would draw answers "not initialized" (build writes those functions). */

static int generator;

int curandCreateGenerator(void **handle, int kind) {
    (void)kind;
    *handle = &generator;
    return 0;
}

int curandDestroyGenerator(void *handle) {
    (void)handle;
    return 0;
}

int curandSetStream(void *handle, void *stream) {
    (void)handle, (void)stream;
    return 0;
}

int curandSetPseudoRandomGeneratorSeed(void *handle, unsigned long long seed) {
    (void)handle, (void)seed;
    return 0;
}
