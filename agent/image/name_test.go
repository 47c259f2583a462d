package image

import (
	"strings"
	"testing"
)

// TestFileName: names that were files' before still are the same ones, and no two VMs have
// the same file, however long and alike their names are.
func TestFileName(t *testing.T) {
	for vm, want := range map[string]string{"web": "web", "a/b c": "a%2Fb%20c", ".new-1": ".new-1", strings.Repeat("x", 200): strings.Repeat("x", 200)} {
		if got := FileName(vm); got != want {
			t.Errorf("%q: %q, want %q", vm, got, want)
		}
	}
	long := strings.Repeat("ü", 127)
	files := map[string]string{}
	for _, vm := range []string{long, long[:252], long + "1", "v" + long, strings.Repeat("x", 201), strings.Repeat("x", 255), strings.Repeat("/", MaxNameBytes), FileName(long)} {
		f := FileName(vm)
		if other, taken := files[f]; taken {
			t.Errorf("%q and %q are both %s", vm, other, f)
		}
		if files[f] = vm; len(f) > maxFileName || strings.ContainsAny(f, "/\x00") {
			t.Errorf("%q: %q of %d bytes", vm, f, len(f))
		}
	}
}
