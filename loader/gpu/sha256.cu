/* SHA-256 over BEP 52 leaves, and the tree above them: what proves pieces in device memory.
 *
 * Order of one check: sha256_leaves, sha256_tail if the last leaf is short, fold, compare.
 *
 * Rules:
 * - A leaf is `leaf_blocks` blocks of 64 bytes (256 in BEP 52; a parameter, so that tests can be small).
 * - A digest is 32 bytes as SHA-256 writes them (big-endian words): two uint4, at 16-byte alignment.
 * - No byte behind the given length is read, and no memory is expected to be zero.
 * - Only 32-bit integers and pointers as arguments: all that torch's launcher can pass.
 * - No headers, so that NVRTC needs no include folder and g++ builds it for the tests (tests/loader/gpu/shim.h).
 *
 * Specs: FIPS 180-4; https://www.bittorrent.org/beps/bep_0052.html
 */
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __constant__ u32 K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

#define ROR(x, n) __funnelshift_r(x, x, n)
#define SWAP(x) __byte_perm(x, 0, 0x0123)

/* One compression. Fully unrolled, so that every index is known and `s` and `w` stay in registers. Consumes `w`. */
__device__ __forceinline__ void compress(u32 *s, u32 *w) {
  u32 a = s[0], b = s[1], c = s[2], d = s[3], e = s[4], f = s[5], g = s[6], h = s[7];
#pragma unroll
  for (int i = 0; i < 64; i++) {
    u32 wi = w[i & 15];
    u32 t1 = h + (ROR(e, 6) ^ ROR(e, 11) ^ ROR(e, 25)) + (g ^ (e & (f ^ g))) + K[i] + wi;
    u32 t2 = (ROR(a, 2) ^ ROR(a, 13) ^ ROR(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g; g = f; f = e; e = d + t1; d = c; c = b; b = a; a = t1 + t2;
    if (i < 48) { /* the schedule rolls over 16 words instead of filling 64 */
      u32 x = w[(i + 14) & 15], y = w[(i + 1) & 15];
      w[i & 15] = wi + (ROR(x, 17) ^ ROR(x, 19) ^ (x >> 10)) + w[(i + 9) & 15] + (ROR(y, 7) ^ ROR(y, 18) ^ (y >> 3));
    }
  }
  s[0] += a; s[1] += b; s[2] += c; s[3] += d; s[4] += e; s[5] += f; s[6] += g; s[7] += h;
}

__device__ __forceinline__ void start(u32 *s) {
  s[0] = 0x6a09e667; s[1] = 0xbb67ae85; s[2] = 0x3c6ef372; s[3] = 0xa54ff53a;
  s[4] = 0x510e527f; s[5] = 0x9b05688c; s[6] = 0x1f83d9ab; s[7] = 0x5be0cd19;
}

__device__ __forceinline__ void unpack(u32 *w, uint4 q) {
  w[0] = SWAP(q.x); w[1] = SWAP(q.y); w[2] = SWAP(q.z); w[3] = SWAP(q.w);
}

__device__ __forceinline__ void store(uint4 *out, const u32 *s) {
  out[0] = make_uint4(SWAP(s[0]), SWAP(s[1]), SWAP(s[2]), SWAP(s[3]));
  out[1] = make_uint4(SWAP(s[4]), SWAP(s[5]), SWAP(s[6]), SWAP(s[7]));
}

/* The block behind a message of whole blocks: the bit 1, zeros, the length in bits (leaves are far below 2^32 bits). */
__device__ __forceinline__ void pad(u32 *w, u32 bits) {
  w[0] = 0x80000000u;
#pragma unroll
  for (int i = 1; i < 15; i++) w[i] = 0;
  w[15] = bits;
}

/* Full leaves `data[0 .. count * leaf_blocks * 64)` to `nodes[0 .. count)`. One thread a leaf.
 * The next block is loaded before this one is compressed: that hides the memory behind 1,400 instructions.
 * The padding goes through the same loop: a second copy of `compress` behind it took sm_90 from 63 registers to 78. */
extern "C" __global__ void __launch_bounds__(128)
sha256_leaves(const uint4 *__restrict__ data, u32 leaf_blocks, u32 count, uint4 *nodes) {
  u32 leaf = blockIdx.x * blockDim.x + threadIdx.x;
  if (leaf >= count) return;
  const uint4 *p = data + (u64)leaf * leaf_blocks * 4;
  u32 s[8], w[16];
  start(s);
  uint4 q0 = __ldg(p), q1 = __ldg(p + 1), q2 = __ldg(p + 2), q3 = __ldg(p + 3);
#pragma unroll 1
  for (u32 block = 0; block <= leaf_blocks; block++) {
    if (block < leaf_blocks) {
      unpack(w, q0); unpack(w + 4, q1); unpack(w + 8, q2); unpack(w + 12, q3);
    } else {
      pad(w, leaf_blocks * 512u);
    }
    p += 4;
    if (block + 1 < leaf_blocks) { q0 = __ldg(p); q1 = __ldg(p + 1); q2 = __ldg(p + 2); q3 = __ldg(p + 3); }
    compress(s, w);
  }
  store(nodes + 2 * (u64)leaf, s);
}

/* The short leaf behind `leaf` full ones: its `length` bytes (1 up to a leaf) to `nodes[leaf]`. One thread in all.
 * BEP 52 hashes the last leaf of a file at its true length. */
extern "C" __global__ void __launch_bounds__(32)
sha256_tail(const uint4 *__restrict__ data, u32 leaf_blocks, u32 leaf, u32 length, uint4 *nodes) {
  if (blockIdx.x || threadIdx.x) return;
  const uint4 *p = data + (u64)leaf * leaf_blocks * 4;
  const unsigned char *bytes = (const unsigned char *)p;
  u32 s[8], w[16];
  start(s);
  u32 blocks = (length + 9 + 63) / 64; /* behind the data: the bit 1 in a byte of its own, and 8 bytes of length */
#pragma unroll 1
  for (u32 block = 0; block < blocks; block++, p += 4) {
    if (64 * block + 64 <= length) {
      unpack(w, __ldg(p)); unpack(w + 4, __ldg(p + 1)); unpack(w + 8, __ldg(p + 2)); unpack(w + 12, __ldg(p + 3));
    } else {
#pragma unroll
      for (u32 i = 0; i < 16; i++) {
        w[i] = 0;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
          u32 at = 64 * block + 4 * i + j;
          w[i] = w[i] << 8 | (at < length ? __ldg(bytes + at) : at == length ? 0x80u : 0u);
        }
      }
      if (block + 1 == blocks) w[15] = length * 8u;
    }
    compress(s, w);
  }
  store(nodes + 2 * (u64)leaf, s);
}

/* Leaf digests of each piece to the piece hash, in place: it ends at `nodes[piece * piece_leaves]`, the rest is rubbish.
 * One thread block a piece. `leaves` in all: the last piece may have fewer than `piece_leaves`. After `levels` levels one node is
 * left; a missing right node is `zeros[level]`, the tree over 2^level zero leaves, so nothing behind the leaves is read.
 *
 * In place is safe: of a row, step k reads nodes [2kT, 2kT + 2T) for T threads and then, behind the barrier, writes
 * [kT, kT + T). What it overwrites was read by this step or an earlier one; what a later step reads lies above. */
extern "C" __global__ void __launch_bounds__(256)
fold(uint4 *nodes, u32 leaves, u32 piece_leaves, u32 levels, const uint4 *__restrict__ zeros) {
  u32 first = blockIdx.x * piece_leaves;
  u32 count = leaves - first < piece_leaves ? leaves - first : piece_leaves;
  uint4 *row = nodes + 2 * (u64)first;
  for (u32 level = 0; level < levels; level++) {
    u32 pairs = (count + 1) / 2;
    for (u32 base = 0; base < pairs; base += blockDim.x) {
      u32 pair = base + threadIdx.x;
      u32 s[8], w[16];
      if (pair < pairs) {
        const uint4 *left = row + 4 * (u64)pair;
        const uint4 *right = 2 * pair + 1 < count ? left + 2 : zeros + 2 * level;
        unpack(w, left[0]); unpack(w + 4, left[1]); unpack(w + 8, right[0]); unpack(w + 12, right[1]);
      }
      __syncthreads();
      if (pair < pairs) {
        start(s);
        compress(s, w);
        pad(w, 512u);
        compress(s, w);
        store(row + 2 * (u64)pair, s);
      }
    }
    __syncthreads();
    count = pairs;
  }
}

/* Piece hashes `nodes[piece * piece_leaves]` with what was signed: 1 into `bad[piece]` for each that differs, no other write. */
extern "C" __global__ void __launch_bounds__(128)
compare(const uint4 *__restrict__ nodes, u32 piece_leaves, const uint4 *__restrict__ expected, u32 pieces, int *bad) {
  u32 piece = blockIdx.x * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  const uint4 *got = nodes + 2 * (u64)piece * piece_leaves, *want = expected + 2 * (u64)piece;
  u32 differs = 0;
  for (int i = 0; i < 2; i++) {
    uint4 a = got[i], b = want[i];
    differs |= (a.x ^ b.x) | (a.y ^ b.y) | (a.z ^ b.z) | (a.w ^ b.w);
  }
  if (differs) bad[piece] = 1;
}
