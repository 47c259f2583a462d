package cmdline

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseConfig(t *testing.T) {
	text := `# a comment
[chardev "mon0"]
  backend = "socket"
  path = "/run/a,b"
  server = "on"
[mon]
  chardev = "mon0"
  mode = "control"

[memory]
  size = "64M"
[smp-opts]
cpus="2"
`
	got, err := ParseConfig(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	want := []Option{
		{Name: "chardev", Value: "id=mon0,backend=socket,path=/run/a,,b,server=on", HasValue: true},
		{Name: "mon", Value: "chardev=mon0,mode=control", HasValue: true},
		{Name: "m", Value: "size=64M", HasValue: true},
		{Name: "smp", Value: "cpus=2", HasValue: true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestParseConfigMalformed(t *testing.T) {
	for _, text := range []string{"a = \"b\"", "[x", "[]", "[a \"b]", "[a]\nb", "[a]\nb = c", "[a]\nb = \"c", "[-a]",
		"[a]\n" + strings.Repeat("x", 5000), strings.Repeat("#\n", 1<<20)} {
		if opts, err := ParseConfig(strings.NewReader(text)); err == nil {
			t.Errorf("%.40q accepted as %v", text, opts)
		}
	}
	if _, err := ParseConfig(strings.NewReader("[a")); !errors.Is(err, ErrSyntax) {
		t.Errorf("error of the wrong kind: %v", err)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add("[chardev \"a\"]\n path = \"x\"\n[mon]\n")
	f.Fuzz(func(t *testing.T, text string) {
		opts, err := ParseConfig(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, o := range opts {
			if _, err := ParseKeyVal(o.Value, ""); err != nil {
				t.Fatalf("%q: %+v: %v", text, o, err)
			}
		}
	})
}
