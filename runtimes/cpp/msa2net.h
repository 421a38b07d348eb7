/* MSA2Net Edge on a device without Python: a camera's frame in, its mask out. C, from any language.

   A bundle is exported with `msa2net export --bake WIDTHxHEIGHT`; its graph for that size runs on OpenVINO, on the CPU.
   Every byte is held against the bundle's digests before it is used (runtimes/BUNDLE.md, section 3), and what was held
   is what is used: the bundle may be replaced, or damaged, once msa2net_open has returned.

   Every function that returns int returns 0, or one of the codes below; then `msa2net_last_error` says where, what was
   found, what was expected and what to do, in one line of ASCII (another byte is shown as '?'). No exception leaves
   this library. */
#ifndef MSA2NET_H
#define MSA2NET_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MSA2NET_API __attribute__((visibility("default")))

enum {
  MSA2NET_OK = 0,
  MSA2NET_ARGUMENT = 1,    /* what the caller gave: a null pointer, a size that nothing is baked for, … */
  MSA2NET_BUNDLE = 2,      /* damaged, changed, incomplete or of an unknown schema */
  MSA2NET_UNAVAILABLE = 3, /* this CPU, or this OpenVINO, cannot run it as exported */
  MSA2NET_OUTPUT = 4       /* the runtime failed, or its output is not finite: there is no mask */
};

typedef struct msa2net msa2net;

/* What a golden frame may differ by, and what it does: the largest |difference| of a logit, the least share of equal
   pixels of a mask. `frames` is the number of golden frames of this size. */
typedef struct {
  int32_t frames;
  double logit_difference, logit_tolerance;
  double pixel_agreement, pixel_tolerance;
} msa2net_report;

/* Figures beside a mask, all from 0 to 1 (runtimes/BUNDLE.md, section 7), and the sum of the MSA2NET_… below of those
   that are beyond what the images of the export keep. They inform: the mask is the same with and without.

   contrast    standard deviation of the frame's values over 255: near 0, it is blank
   saturation  share of the frame's values that are 255
   margin      mean over pixels of the best class's probability less the second's
   border      share of the pixels at the mask's edge that are foreground: above 0, the mask touches the border
   area        share of pixels that are foreground */
typedef struct {
  double contrast, saturation, margin, border, area;
  uint32_t flags;
} msa2net_quality;

enum {
  MSA2NET_CONTRAST = 1,
  MSA2NET_SATURATION = 2,
  MSA2NET_MARGIN = 4,
  MSA2NET_BORDER = 8,
  MSA2NET_AREA = 16,
  MSA2NET_NO_LIMITS = 32 /* alone: the bundle has none */
};

/* Opens a bundle's graph for one size of frames.

   bundle     path of its folder, UTF-8
   precision  "fp32", "bf16", "int8" or "int8-portable": never changed in silence
   rows, columns, channels   of the frames: H, W, and 3 (red, green, blue) or 1 (grey)
   threads    for one frame; 0: what OpenVINO chooses. Give the number where a container has a share of the cores.
   model      where the handle goes; it is the caller's, to be given to msa2net_close. NULL if it fails. */
MSA2NET_API int msa2net_open(const char* bundle, const char* precision, int32_t rows, int32_t columns, int32_t channels,
                             int32_t threads, msa2net** model);

/* Segments one frame. From any thread; frames of several threads wait for each other. Not in a child after a fork: it
   gets MSA2NET_UNAVAILABLE, opens the bundle itself, and closes nothing of its parent's.

   frame       rows * columns * channels bytes, row by row, the channels of a pixel side by side; not changed
   mask        rows * columns bytes, of the caller: the class of each pixel. Written only if the call succeeds.
   confidence  the same, or NULL: 255 times the probability of the mask's class; needs --bake-outputs confidence
   quality     of the caller, or NULL; written as the mask is */
MSA2NET_API int msa2net_predict(msa2net* model, const uint8_t* frame, uint8_t* mask, uint8_t* confidence,
                                msa2net_quality* quality);

/* Runs the golden frames of this size against the outputs recorded at export. MSA2NET_OUTPUT if they are off; the
   report has what was found up to there, all zero where nothing was. */
MSA2NET_API int msa2net_self_test(msa2net* model, msa2net_report* report);

/* SHA-256 of the bundle's SHA256SUMS in hexadecimal: log it with each result. Valid until msa2net_close. */
MSA2NET_API const char* msa2net_digest(const msa2net* model);

/* The name of a class, 0 the background; NULL beyond the last. Valid until msa2net_close. */
MSA2NET_API const char* msa2net_class_name(const msa2net* model, int32_t index);

/* Of this thread's last failure; "" if there was none. Valid until this thread's next call. */
MSA2NET_API const char* msa2net_last_error(void);

/* Frees it; NULL is allowed. No other call with it may be running or follow. */
MSA2NET_API void msa2net_close(msa2net* model);

#ifdef __cplusplus
}
#endif
#endif
