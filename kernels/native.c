// A decoder's operations in bfloat16 for x86-64 processors with AMX and AVX-512 BF16 and FP16: what torch does in
// hundreds of small operations a step, in a few. `native.py` builds this file, and says what each function's arguments
// are.
//
//   threads  tiles  weights  many_tokens  few_tokens  products   between   queries  softmax  pages  attention
//   of torch  AMX   what is multiplied, and how                  norms     what of a context counts for whom
//
// Names: T tokens of a step, H query heads, K key/value heads, D head size. A tile is 16 rows of 64 bytes. Products are
// summed in float32 in the order of the inner dimension, whatever is computed beside them: a row's result does not
// depend on the others.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;
typedef int64_t i64;

#define ALIGNED __attribute__((aligned(64)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#include "c/threads.h"
#include "c/tiles.h"
#include "c/weights.h"
#include "c/many_tokens.h"
#include "c/few_tokens.h"
#include "c/products.h"
#include "c/between.h"
#include "c/queries.h"
#include "c/softmax.h"
#include "c/pages.h"
#include "c/attention.h"

typedef struct {
    const bf16 *attention_norm, *q_norm, *k_norm, *mlp_norm;
    const Weight *qkv, *o, *gated, *down;
} Layer;

typedef struct {
    i64 tokens, hidden;
    float eps;
    const bf16 *cos, *sin;
    const i64 *places;
    bf16 *kv;
    i64 layer_stride, side_stride;  // between the layers of kv, and between keys and values of one
    bf16 *x, *added, *h, *qkv, *q, *attended, *gated;
} Pass;

// Takes x through all layers, but for what the last one adds to it, which is `added`.
int treadle_layers(const Layer *layers, i64 count, const Pass *pass, const Contexts *contexts) {
    const i64 tokens = pass->tokens, hidden = pass->hidden;
    int ok = normalize(pass->x, NULL, layers->attention_norm, pass->h, tokens, hidden, pass->eps, TILES);
    for (i64 i = 0; i < count && ok; i++) {
        const Layer *layer = layers + i;
        bf16 *keys = pass->kv + i * pass->layer_stride, *values = keys + pass->side_stride;
        ok = multiply_tiles(layer->qkv, pass->h, pass->qkv, tokens, ROWS) &&
             treadle_norm_rope_write(pass->qkv, layer->q_norm, layer->k_norm, pass->eps, pass->cos, pass->sin, keys,
                                     values, pass->places, pass->q, tokens, contexts->heads, contexts->kv_heads,
                                     contexts->size) &&
             attend_all(contexts, pass->q, keys, values, pass->attended, TILES) &&
             multiply_tiles(layer->o, pass->attended, pass->added, tokens, ROWS) &&
             normalize(pass->added, pass->x, layer->mlp_norm, pass->h, tokens, hidden, pass->eps, TILES) &&
             multiply_tiles(layer->gated, pass->h, pass->gated, tokens, TILES) &&
             multiply_tiles(layer->down, pass->gated, pass->added, tokens, ROWS) &&
             (i + 1 == count ||
              normalize(pass->added, pass->x, layer[1].attention_norm, pass->h, tokens, hidden, pass->eps, TILES));
    }
    return ok;
}
