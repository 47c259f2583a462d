package inject

import "encoding/binary"

// cpuid executes CPUID.
func cpuid(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)

// xgetbv reads XCR0; only valid where haveXsave.
func xgetbv() (lo, hi uint32)

func haveXsave() bool {
	maxLeaf, _, _, _ := cpuid(0, 0)
	_, _, ecx, _ := cpuid(1, 0)
	const osxsave = 1 << 27
	return maxLeaf >= 0xd && ecx&osxsave != 0
}

// xstateMaxBytes is the size of an XSAVE area (standard form) that holds every
// state component the kernel enabled, 512 without XSAVE.
func xstateMaxBytes() int {
	if !haveXsave() {
		return 512
	}
	_, ebx, _, _ := cpuid(0xd, 0)
	return int(ebx)
}

// enabledFeatures is XCR0, the state components the kernel enabled; it is the
// same for every process of the machine.
func enabledFeatures() uint64 {
	if !haveXsave() {
		return 3
	}
	lo, hi := xgetbv()
	return uint64(hi)<<32 | uint64(lo)
}

// usedXstate is how many bytes of the image sigreturn needs, and which
// components it is to load from them: those in use, x87 and SSE, and PKRU
// (whose initial value is not what an absent one should become). Leaving out
// the rest keeps the image within what the kernel accepts from a task that has
// no permission for AMX; what is left out is in its initial state anyway.
func usedXstate(xstate []byte, xcr0 uint64) (size int, features uint64) {
	if len(xstate) < 576 {
		return min(len(xstate), 512), 3
	}
	features = binary.LittleEndian.Uint64(xstate[xsaveHeader:])&xcr0 | 3 | xcr0&xfeaturePKRU
	size = 576
	for i := 2; i < 63; i++ {
		if features&(1<<i) == 0 {
			continue
		}
		n, off, _, _ := cpuid(0xd, uint32(i))
		if end := int(off) + int(n); end > size && end <= len(xstate) {
			size = end
		}
	}
	return size, features
}
