package cmdline

import (
	"errors"
	"fmt"
	"strings"
)

// ErrSyntax is wrapped by every error about text that QEMU itself would not
// have accepted.
var ErrSyntax = errors.New("not a QEMU command line")

// Option is one option of a command line.
type Option struct {
	Name     string // without dashes; "hda" for a bare word, which is what QEMU makes of it
	Value    string // as given; take it apart with KeyVal
	HasValue bool   // false: the option stands alone
	Bare     bool   // a disk image given without an option; rendered without one again
	Unknown  bool   // not in the table: whether it takes a value is a guess
}

// Parse splits args (without argv[0]) into options. "-name" and "--name" are
// the same. It fails only where QEMU would have refused to start: an option
// without a name or without its value.
func Parse(args []string) ([]Option, error) {
	opts := make([]Option, 0, len(args))
	for i := 0; i < len(args); i++ {
		word := args[i]
		if !strings.HasPrefix(word, "-") {
			opts = append(opts, Option{Name: "hda", Value: word, HasValue: true, Bare: true})
			continue
		}
		name := strings.TrimPrefix(word[1:], "-")
		if name == "" || name[0] == '-' {
			return nil, fmt.Errorf("argument %d, %q: %w", i+1, word, ErrSyntax)
		}
		takes, known := TakesValue(name)
		o := Option{Name: name, Unknown: !known}
		switch {
		case takes && i+1 == len(args):
			return nil, fmt.Errorf("option -%s without its value: %w", name, ErrSyntax)
		case takes:
			o.HasValue = true
		case !known:
			// Most of QEMU's options take a value, and a disk image given as a
			// bare word is rare; a guess gone wrong renders the same words.
			o.HasValue = i+1 < len(args) && !strings.HasPrefix(args[i+1], "-")
		}
		if o.HasValue {
			i++
			o.Value = args[i]
		}
		opts = append(opts, o)
	}
	return opts, nil
}

// Render is the inverse of Parse, up to the number of dashes.
func Render(opts []Option) []string {
	args := make([]string, 0, 2*len(opts))
	for _, o := range opts {
		// A bare word that has become something an option would look like (a
		// rewritten path) needs its option again.
		if o.Bare && !strings.HasPrefix(o.Value, "-") {
			args = append(args, o.Value)
			continue
		}
		args = append(args, "-"+o.Name)
		if o.HasValue {
			args = append(args, o.Value)
		}
	}
	return args
}

// KeyVal takes the option's value apart, with the implied key QEMU uses for
// this option. It fails for options that are not made of key=value.
func (o Option) KeyVal() (*KeyVal, error) {
	key, ok := Implied(o.Name)
	if !ok || !o.HasValue {
		return nil, fmt.Errorf("option -%s has no key=value form: %w", o.Name, ErrSyntax)
	}
	return ParseKeyVal(o.Value, key)
}
