package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/problem"
)

func TestSplitWords(t *testing.T) {
	for text, want := range map[string][]string{
		"":                                   nil,
		" qemu  -m\t1G\n":                    {"qemu", "-m", "1G"},
		"LC_ALL=C \\\nqemu \\\n-name 'a b'":  {"LC_ALL=C", "qemu", "-name", "a b"},
		`-append "a \"b\" \x $" ''`:          {"-append", `a "b" \x $`, ""},
		`a\ b 'c\d' "e'f"g`:                  {"a b", `c\d`, "e'fg"},
		`-object '{"qom-type":"secret"}' -S`: {"-object", `{"qom-type":"secret"}`, "-S"},
	} {
		if got, err := splitWords(text); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
	for _, text := range []string{"'", `a "b`, `a\`} {
		if got, err := splitWords(text); err == nil {
			t.Errorf("%q: %q", text, got)
		}
	}
}

// TestShellLineSplits takes apart what was put together.
func TestShellLineSplits(t *testing.T) {
	for _, argv := range [][]string{{"qemu", "-append", "a 'b' \"c\" $d \\", "", "-m", "1G"}, {"'", "\n", "\\\n"}} {
		if got, err := splitWords(shellLine(argv)); err != nil || !slices.Equal(got, argv) {
			t.Errorf("%q: %q, %v", argv, got, err)
		}
	}
}

// TestReadArgv reads a command line in every form it is found in.
func TestReadArgv(t *testing.T) {
	want := []string{"/usr/bin/qemu-system-x86_64", "-name", "guest=web,debug-threads=on", "-object", `{"qom-type":"secret","id":"m"}`}
	const start = "2026-11-22 03:30:15.347+0000: starting up libvirt version: 9.0.0, package: x, hostname: vm\n"
	for name, text := range map[string]string{
		"cmdline": strings.Join(want, "\x00") + "\x00",
		"JSON":    ` ["/usr/bin/qemu-system-x86_64","-name","guest=web,debug-threads=on","-object","{\"qom-type\":\"secret\",\"id\":\"m\"}"]`,
		"shell":   "LC_ALL=C " + shellLine(want) + "\n",
		"log": start + "LC_ALL=C \\\n/usr/bin/other \\\n-S\nchar device redirected\n" + start +
			"LC_ALL=C \\\nHOME=/x \\\n/usr/bin/qemu-system-x86_64 \\\n-name guest=web,debug-threads=on \\\n-object '{\"qom-type\":\"secret\",\"id\":\"m\"}'\n2026: shutting down, reason='x\n",
	} {
		path := filepath.Join(t.TempDir(), "argv")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readArgv(path); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := readArgv(filepath.Join(t.TempDir(), "none")); !problem.Is(err, problem.Usage) {
		t.Errorf("no file: %v", err)
	}
}

func FuzzSplitWords(f *testing.F) {
	f.Add("qemu -name 'a b' \"c\\\"\" d\\ e")
	f.Fuzz(func(t *testing.T, text string) {
		words, err := splitWords(text)
		if err != nil {
			return
		}
		if again, err := splitWords(shellLine(words)); err != nil || !slices.Equal(again, words) {
			t.Fatalf("%q are %q, which become %q (%v)", text, words, again, err)
		}
	})
}
