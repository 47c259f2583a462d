package uffd

import (
	"fmt"
	"math/bits"
	"strings"
)

var featureNames = [...]string{
	"PAGEFAULT_FLAG_WP", "EVENT_FORK", "EVENT_REMAP", "EVENT_REMOVE",
	"MISSING_HUGETLBFS", "MISSING_SHMEM", "EVENT_UNMAP", "SIGBUS", "THREAD_ID",
	"MINOR_HUGETLBFS", "MINOR_SHMEM", "EXACT_ADDRESS", "WP_HUGETLBFS_SHMEM",
	"WP_UNPOPULATED", "POISON", "WP_ASYNC", "MOVE",
}

// Names lists the set features by the kernel's names, unknown bits by number.
func (f Features) Names() []string {
	var out []string
	for v := uint64(f); v != 0; v &= v - 1 {
		b := bits.TrailingZeros64(v)
		if b < len(featureNames) {
			out = append(out, featureNames[b])
		} else {
			out = append(out, fmt.Sprintf("bit%d", b))
		}
	}
	return out
}

// String is Names joined by commas, "none" if empty.
func (f Features) String() string {
	if f == 0 {
		return "none"
	}
	return strings.Join(f.Names(), ",")
}

// Has reports whether all of want is in f.
func (f Features) Has(want Features) bool { return f&want == want }

// Has reports whether all of want is in i.
func (i Ioctls) Has(want Ioctls) bool { return i&want == want }

// String spells the modes.
func (m Mode) String() string {
	var out []string
	for _, x := range []struct {
		bit  Mode
		name string
	}{{ModeMissing, "missing"}, {ModeWP, "wp"}, {ModeMinor, "minor"}} {
		if m&x.bit != 0 {
			out = append(out, x.name)
		}
	}
	if rest := m &^ (ModeMissing | ModeWP | ModeMinor); rest != 0 || m == 0 {
		out = append(out, fmt.Sprintf("%#x", uint64(rest)))
	}
	return strings.Join(out, "|")
}
