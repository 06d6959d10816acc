// Whether the system lets this process use what it was compiled for.

#include "vectors.h"

#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>

// Linux gives the tiles of AMX to processes that ask for them (Documentation/arch/x86/xstate.rst).
constexpr int ARCH_REQ_XCOMP_PERM = 0x1023;
constexpr int XFEATURE_XTILEDATA = 18;

EXPORT int inferfleet_is_usable() { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0; }
#else
EXPORT int inferfleet_is_usable() { return 1; }
#endif
