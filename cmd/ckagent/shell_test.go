package main

import (
	"slices"
	"testing"
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
