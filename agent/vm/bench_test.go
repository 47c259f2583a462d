package vm

import (
	"testing"
)

// BenchmarkLayoutWithHints is what a restore pays before it can arm.
func BenchmarkLayoutWithHints(b *testing.B) {
	for _, build := range builds(b) {
		b.Run(build.name, func(b *testing.B) {
			tgt := openQEMU(b, build, "-S", "-M", "pc", "-m", "1024")
			hints, err := tgt.Layout(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, err := ResolveLayout(b.Context(), tgt.Process, tgt.QMP, hints); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkLayout is the long way, at attach.
func BenchmarkLayout(b *testing.B) {
	for _, build := range builds(b) {
		b.Run(build.name, func(b *testing.B) {
			tgt := openQEMU(b, build, "-S", "-M", "pc", "-m", "1024")
			for b.Loop() {
				if _, err := ResolveLayout(b.Context(), tgt.Process, tgt.QMP, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
