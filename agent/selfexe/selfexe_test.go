package selfexe

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestPath: an upgrade in place puts another file where ours was.
func TestPath(t *testing.T) {
	named, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "ckagent")
	if err := os.WriteFile(other, nil, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ named, want string }{
		{named, named}, {other, running}, {other + "-removed", running},
	} {
		if got := choose(c.named); got != c.want {
			t.Errorf("%s: %s, want %s", c.named, got, c.want)
		}
	}
	if got := Or(nil); !slices.Equal(got, []string{named}) {
		t.Errorf("%q, want %q", got, named)
	}
	if got := Or([]string{"a", "b"}); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("%q: not what was given", got)
	}
}
