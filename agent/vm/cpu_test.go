package vm

import (
	"slices"
	"testing"
)

func TestCPUFeatures(t *testing.T) {
	f := CPUFeatures{Vendor: "AuthenticAMD", Words: map[string]uint32{"1.0.edx": 0x0f8bfbff, "7.0.ebx": 1 << 20, "d.1.eax": 0}}
	const text = "AuthenticAMD 1.0.edx=f8bfbff 7.0.ebx=100000"
	if got := f.String(); got != text {
		t.Fatalf("recorded as %q", got)
	}
	g, err := ParseCPUFeatures(text)
	if err != nil || g.String() != text || len(f.Lacks(g))+len(g.Lacks(f)) > 0 || g.Vendor != f.Vendor {
		t.Errorf("%+v, %v", g, err)
	}
	g.Words["7.0.ebx"] = 0
	if got := f.Lacks(g); !slices.Equal(got, []string{"CPUID 7.0.ebx bit 20"}) || len(g.Lacks(f)) > 0 {
		t.Errorf("lacks %q, more %q", got, g.Lacks(f))
	}
	if none, err := ParseCPUFeatures(""); err != nil || none.String() != "" {
		t.Errorf("nothing: %+v, %v", none, err)
	}
	for _, bad := range []string{"A x", "A x=", "A x=100000000", "A x=zz"} {
		if _, err := ParseCPUFeatures(bad); err == nil {
			t.Errorf("%q was understood", bad)
		}
	}
}

func FuzzCPUFeatures(f *testing.F) {
	f.Add("AuthenticAMD 1.0.edx=f8bfbff 7.0.ebx=100000")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseCPUFeatures(s)
		if err != nil {
			return
		}
		if len(a.Words) > maxCPUWords {
			t.Fatalf("%d words", len(a.Words))
		}
		b, err := ParseCPUFeatures(a.String())
		if err != nil || len(a.Lacks(b))+len(b.Lacks(a)) > 0 {
			t.Fatalf("%q came back as %+v: %v", s, b, err)
		}
	})
}
