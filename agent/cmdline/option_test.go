package cmdline

import (
	"bufio"
	"errors"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	args := strings.Fields("-name guest=a,debug-threads=on --machine pc -m 64 -nodefaults --S " +
		"-device virtio-rng-pci disk.img -append -quiet -future-option x -future-flag -snapshot")
	opts, err := Parse(args)
	if err != nil {
		t.Fatal(err)
	}
	want := []Option{
		{Name: "name", Value: "guest=a,debug-threads=on", HasValue: true},
		{Name: "machine", Value: "pc", HasValue: true},
		{Name: "m", Value: "64", HasValue: true},
		{Name: "nodefaults"},
		{Name: "S"},
		{Name: "device", Value: "virtio-rng-pci", HasValue: true},
		{Name: "hda", Value: "disk.img", HasValue: true, Bare: true},
		{Name: "append", Value: "-quiet", HasValue: true},
		{Name: "future-option", Value: "x", HasValue: true, Unknown: true},
		{Name: "future-flag", Unknown: true},
		{Name: "snapshot"},
	}
	if diff := cmp.Diff(want, opts); diff != "" {
		t.Error(diff)
	}
	got := Render(opts)
	for i, w := range args {
		if strings.HasPrefix(w, "--") {
			args[i] = w[1:]
		}
	}
	if diff := cmp.Diff(args, got); diff != "" {
		t.Error(diff)
	}
}

func TestParseRefusesWhatQEMURefuses(t *testing.T) {
	for _, args := range [][]string{{"-m"}, {"-"}, {"--"}, {"---m", "64"}, {"-S", "-qmp"}} {
		if opts, err := Parse(args); !errors.Is(err, ErrSyntax) {
			t.Errorf("Parse(%q) = %v, %v; want ErrSyntax", args, opts, err)
		}
	}
}

func TestBareWordThatStartsWithADash(t *testing.T) {
	got := Render([]Option{{Name: "hda", Value: "-odd", HasValue: true, Bare: true}})
	if !slices.Equal(got, []string{"-hda", "-odd"}) {
		t.Errorf("got %q", got)
	}
}

// TestTableAgainstBinary holds the tables against the installed QEMU: every
// option of its help must be known, and every option it accepts must agree about
// the value. "-version -opt" makes QEMU parse all of its arguments, complain
// about an unknown or incomplete one, and otherwise print its version.
func TestTableAgainstBinary(t *testing.T) {
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	help, err := exec.Command(bin, "-help").Output()
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	line := regexp.MustCompile(`^--?([A-Za-z][-_A-Za-z0-9]*)(?:/-([a-z]+))?(?: or -([a-z]+))?(?:[ \t[].*)?$`)
	sc := bufio.NewScanner(strings.NewReader(string(help)))
	inHelp := 0
	for sc.Scan() {
		if m := line.FindStringSubmatch(sc.Text()); m != nil {
			inHelp++
			for _, name := range m[1:] {
				if name == "" {
					continue
				}
				if _, known := TakesValue(name); !known {
					t.Errorf("option -%s of %q is not in the table", name, sc.Text())
				}
				names[name] = true
			}
		}
	}
	if inHelp < 80 {
		t.Fatalf("only %d options found in the help: its form has changed", inHelp)
	}
	for name := range noValue {
		names[name] = true
	}
	for name := range withValue {
		if noValue[name] {
			t.Errorf("-%s is in both tables", name)
		}
		names[name] = true
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 4)
	accepted := make(chan string, len(names))
	for name := range names {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			out, err := exec.Command(bin, "-version", "-"+name).CombinedOutput()
			takes, _ := TakesValue(name)
			switch text := string(out); {
			case strings.Contains(text, "invalid option"):
				return // of another release
			case strings.Contains(text, "requires an argument"):
				if !takes {
					t.Errorf("-%s takes a value here", name)
				}
			case err == nil && strings.Contains(text, "version"):
				if takes {
					t.Errorf("-%s takes no value here", name)
				}
			default:
				t.Errorf("-%s: %v: %s", name, err, text)
			}
			accepted <- name
		})
	}
	wg.Wait()
	if len(accepted) < 100 {
		t.Errorf("QEMU accepted only %d of %d options", len(accepted), len(names))
	}
}

func FuzzParse(f *testing.F) {
	f.Add("-name\x00vm1\x00-m\x0064\x00--S\x00disk.img")
	f.Add("-future\x00x\x00-\x00")
	f.Fuzz(func(t *testing.T, joined string) {
		args := strings.Split(joined, "\x00")
		opts, err := Parse(args)
		if err != nil {
			if !errors.Is(err, ErrSyntax) {
				t.Fatalf("error of the wrong kind: %v", err)
			}
			return
		}
		again := Render(opts)
		if len(again) != len(args) {
			t.Fatalf("%q rendered as %q", args, again)
		}
		for i := range args {
			if args[i] != again[i] && args[i] != "-"+again[i] {
				t.Fatalf("%q rendered as %q", args[i], again[i])
			}
		}
		opts2, err := Parse(again)
		if err != nil || !slices.Equal(opts, opts2) {
			t.Fatalf("%+v became %+v (%v)", opts, opts2, err)
		}
	})
}
