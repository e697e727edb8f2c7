// What stands between products.

enum { LEAST_SHARED = 1 << 13 };  // numbers, for which it is worth it to wake another thread

typedef struct {
    const bf16 *x, *weight;
    bf16 *total, *out;
    i64 tokens, size;
    float eps;
    int form;
} Norm;

static float inverse_rms(const bf16 *x, i64 size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (i64 i = 0; i < size; i += 16) {
        const __m512 value = load_bf16(x + i);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + eps);
}

static void scale_by(const bf16 *x, float factor, const bf16 *weight, i64 size, bf16 *out) {
    const __m512 wide = _mm512_set1_ps(factor);
    for (i64 i = 0; i < size; i += 16)
        store_bf16(out + i, _mm512_mul_ps(_mm512_mul_ps(load_bf16(x + i), wide), load_bf16(weight + i)));
}

static void norm_token(void *job, i64 token, char *memory) {
    (void)memory;
    const Norm *norm = job;
    const i64 size = norm->size;
    const bf16 *x = norm->x + token * size;
    if (norm->total) {
        bf16 *total = norm->total + token * size;
        for (i64 i = 0; i < size; i += 16)
            store_bf16(total + i, _mm512_add_ps(load_bf16(x + i), load_bf16(total + i)));
        x = total;
    }
    const float factor = inverse_rms(x, size, norm->eps);
    if (norm->form == ROWS) {
        scale_by(x, factor, norm->weight, size, norm->out + token * size);
        return;
    }
    for (i64 i = 0; i < size; i += 32)
        scale_by(x + i, factor, norm->weight + i, 32, norm->out + tile_place(token, i, size));
}

static int normalize(const bf16 *x, bf16 *total, const bf16 *weight, bf16 *out, i64 tokens, i64 size, float eps,
                     int form) {
    Norm norm = {x, weight, total, out, tokens, size, eps, form};
    if (tokens * size < LEAST_SHARED) {
        for (i64 token = 0; token < tokens; token++) norm_token(&norm, token, NULL);
        return 1;
    }
    return run(norm_token, &norm, tokens, 4, 0, OWN);
}

// The norm of x + total, where total becomes that sum; of x if there is no total.
int treadle_norm(const bf16 *x, bf16 *total, const bf16 *weight, bf16 *out, i64 tokens, i64 size, float eps) {
    return normalize(x, total, weight, out, tokens, size, eps, ROWS);
}

typedef struct {
    const bf16 *qkv, *q_norm, *k_norm, *cos, *sin;
    bf16 *queries, *keys, *values;
    const i64 *places;
    i64 heads, kv_heads, size;
    float eps;
} Heads;

static void turn_head(const Heads *job, const bf16 *head, const bf16 *weight, i64 token, bf16 *out) {
    const i64 size = job->size, half = size / 2;
    const bf16 *cos = job->cos + token * size, *sin = job->sin + token * size;
    bf16 ALIGNED normed[512];
    if (weight) {
        scale_by(head, inverse_rms(head, size, job->eps), weight, size, normed);
        head = normed;
    }
    for (i64 i = 0; i < half; i += 16) {
        const __m512 low = load_bf16(head + i), high = load_bf16(head + half + i);
        const __m512 turned = _mm512_mul_ps(low, load_bf16(cos + i));
        store_bf16(out + i, _mm512_fnmadd_ps(high, load_bf16(sin + i), turned));
        const __m512 other = _mm512_mul_ps(high, load_bf16(cos + half + i));
        store_bf16(out + half + i, _mm512_fmadd_ps(low, load_bf16(sin + half + i), other));
    }
}

static void heads_of_token(void *shared, i64 token, char *memory) {
    (void)memory;
    const Heads *job = shared;
    const i64 size = job->size, row = job->kv_heads * size;
    const bf16 *qkv = job->qkv + token * (job->heads * size + 2 * row);
    for (i64 head = 0; head < job->heads; head++)
        turn_head(job, qkv + head * size, job->q_norm, token, job->queries + (token * job->heads + head) * size);
    const i64 place = job->places[token];
    if (place < 0) return;
    qkv += job->heads * size;
    for (i64 head = 0; head < job->kv_heads; head++)
        turn_head(job, qkv + head * size, job->k_norm, token, job->keys + place * row + head * size);
    memcpy(job->values + place * row, qkv + row, (size_t)row * sizeof(bf16));
}

int treadle_norm_rope_write(const bf16 *qkv, const bf16 *q_norm, const bf16 *k_norm, float eps, const bf16 *cos,
                            const bf16 *sin, bf16 *keys, bf16 *values, const i64 *places, bf16 *queries, i64 tokens,
                            i64 heads, i64 kv_heads, i64 size) {
    Heads job = {qkv, q_norm, k_norm, cos, sin, queries, keys, values, places, heads, kv_heads, size, eps};
    if (tokens * (heads + 2 * kv_heads) * size < LEAST_SHARED) {
        for (i64 token = 0; token < tokens; token++) heads_of_token(&job, token, NULL);
        return 1;
    }
    return run(heads_of_token, &job, tokens, 4, 0, OWN);
}
