/* Packing rows: sequences [begin, end) copied between a padded [B, T, D] and a packed [N, D] tensor of any dtype.
 * Strides in elements of `size` bytes; offsets int64 [B + 1]; left = padding stands before the tokens. */
#include "fairlead.h"

FL_INLINE void copy_row(char *to, int64_t to_step, const char *from, int64_t from_step, int64_t depth, int64_t size) {
    if (to_step == 1 && from_step == 1) {
        memcpy(to, from, (size_t)(depth * size));
        return;
    }
    for (int64_t d = 0; d < depth; ++d) memcpy(to + d * to_step * size, from + d * from_step * size, (size_t)size);
}

FL_EXPORT void fl_pack_rows(int64_t begin, int64_t end, const void *values, int64_t batch_stride, int64_t token_stride,
                            int64_t column_stride, int64_t width, int64_t depth, int64_t size, const int64_t *offsets,
                            int32_t left, void *out, int64_t *position) {
    for (int64_t b = begin; b < end; ++b) {
        const int64_t count = offsets[b + 1] - offsets[b], skip = left ? width - count : 0;
        const char *from = (const char *)values + (b * batch_stride + skip * token_stride) * size;
        char *to = (char *)out + offsets[b] * depth * size;
        for (int64_t t = 0; t < count; ++t) position[offsets[b] + t] = t;
        if (column_stride == 1 && token_stride == depth) memcpy(to, from, (size_t)(count * depth * size));
        else
            for (int64_t t = 0; t < count; ++t)
                copy_row(to + t * depth * size, 1, from + t * token_stride * size, column_stride, depth, size);
    }
}

FL_INLINE void fill_sized(char *to, const char *value, int64_t count, const int64_t size) {
    for (int64_t i = 0; i < count; ++i) memcpy(to + i * size, value, (size_t)size);
}

/* `count` copies of a value; sizes that the compiler knows become stores instead of calls. */
FL_INLINE void fill_with(char *to, const char *value, int64_t count, int64_t size) {
    if (size == 4) fill_sized(to, value, count, 4);
    else if (size == 2) fill_sized(to, value, count, 2);
    else if (size == 8) fill_sized(to, value, count, 8);
    else if (size == 1) fill_sized(to, value, count, 1);
    else fill_sized(to, value, count, size);
}

FL_EXPORT void fl_unpack_rows(int64_t begin, int64_t end, const void *rows, int64_t row_stride, int64_t column_stride,
                              int64_t width, int64_t depth, int64_t size, const int64_t *offsets, int32_t left,
                              const void *fill, void *out) {
    for (int64_t b = begin; b < end; ++b) {
        const int64_t count = offsets[b + 1] - offsets[b], skip = left ? width - count : 0;
        char *line = (char *)out + b * width * depth * size;
        fill_with(line, fill, skip * depth, size);
        fill_with(line + (skip + count) * depth * size, fill, (width - skip - count) * depth, size);
        char *to = line + skip * depth * size;
        const char *from = (const char *)rows + offsets[b] * row_stride * size;
        if (column_stride == 1 && row_stride == depth) memcpy(to, from, (size_t)(count * depth * size));
        else
            for (int64_t t = 0; t < count; ++t)
                copy_row(to + t * depth * size, 1, from + t * row_stride * size, column_stride, depth, size);
    }
}
