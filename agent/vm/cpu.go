package vm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/qmp"
)

// CPUFeatures is what CPUID says to a guest: what is left of the model that was
// asked for on this host and accelerator. A guest uses what it found when it booted,
// so it must find it again wherever it goes on.
type CPUFeatures struct {
	Vendor string
	Words  map[string]uint32 // by leaf, subleaf and register, such as 7.0.ebx
}

const maxCPUWords = 256 // QEMU has some forty

// ReadCPUFeatures asks QEMU what the CPU at a QOM path offers. The zero value means
// that it does not say: no x86.
func ReadCPUFeatures(ctx context.Context, q Monitor, path string) (CPUFeatures, error) {
	type word struct {
		Register string `json:"cpuid-register"`
		Leaf     uint32 `json:"cpuid-input-eax"`
		Subleaf  uint32 `json:"cpuid-input-ecx"`
		Features uint32 `json:"features"`
	}
	words, err := qomGet[[]word](ctx, q, path, "feature-words")
	if _, refused := errors.AsType[*qmp.Error](err); refused {
		return CPUFeatures{}, nil
	}
	if err != nil {
		return CPUFeatures{}, fmt.Errorf("features of %s: %w", path, err)
	}
	f := CPUFeatures{Words: make(map[string]uint32, len(words))}
	for _, w := range words[:min(len(words), maxCPUWords)] {
		f.Words[fmt.Sprintf("%x.%x.%s", w.Leaf, w.Subleaf, strings.ToLower(w.Register))] = w.Features
	}
	if f.Vendor, err = qomGet[string](ctx, q, path, "vendor"); err != nil {
		return CPUFeatures{}, fmt.Errorf("vendor of %s: %w", path, err)
	}
	return f, nil
}

// String is the form that is recorded: "AuthenticAMD 1.0.edx=78bfbfd ...", "" for
// the zero value. Words without a feature are left out.
func (f CPUFeatures) String() string {
	if len(f.Words) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString(f.Vendor)
	for _, k := range slices.Sorted(maps.Keys(f.Words)) {
		if v := f.Words[k]; v != 0 {
			fmt.Fprintf(&b, " %s=%x", k, v)
		}
	}
	return b.String()
}

// ParseCPUFeatures reads what String wrote.
func ParseCPUFeatures(s string) (CPUFeatures, error) {
	if s == "" {
		return CPUFeatures{}, nil
	}
	vendor, rest, _ := strings.Cut(s, " ")
	f := CPUFeatures{Vendor: vendor, Words: map[string]uint32{}}
	for _, word := range strings.Fields(rest) {
		k, v, ok := strings.Cut(word, "=")
		n, err := strconv.ParseUint(v, 16, 32)
		if !ok || err != nil || len(f.Words) == maxCPUWords {
			return CPUFeatures{}, fmt.Errorf("CPU features: word %.40q", word)
		}
		f.Words[k] = uint32(n)
	}
	return f, nil
}

// Lacks lists what f has and other has not, as "leaf.subleaf.register bit n".
func (f CPUFeatures) Lacks(other CPUFeatures) []string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(f.Words)) {
		for gone := f.Words[k] &^ other.Words[k]; gone != 0; gone &= gone - 1 {
			out = append(out, fmt.Sprintf("CPUID %s bit %d", k, bits.TrailingZeros32(gone)))
		}
	}
	return out
}
