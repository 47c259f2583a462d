package cmdline

import (
	"fmt"
	"strconv"
	"strings"
)

// Limits of what is accepted; the kernel itself bounds one argument to 128 KiB.
const (
	maxValueBytes = 1 << 20
	maxPairs      = 1 << 16
)

// form is how a pair was written, so that it can be written that way again.
type form uint8

const (
	explicit form = iota // key=value
	bare                 // value, first, of the implied key
	flag                 // key, meaning key=on, or nokey, meaning key=off
)

type pair struct {
	key, val string
	form     form
}

// KeyVal is the value of an option such as -device: an ordered list of
// key=value with ",," standing for a comma, or a JSON object. It keeps the form
// it was parsed from, the order, and repeated keys.
type KeyVal struct {
	implied string
	pairs   []pair // key=value form
	obj     *node  // JSON form
	source  string // what was parsed; given back as long as nothing changed
	changed bool
}

// ParseKeyVal parses s. implied is the key a leading bare value stands for
// ("type", "driver", "backend", "qom-type"), empty where there is none: a bare
// word is then a flag. A value that starts with "{" is JSON.
func ParseKeyVal(s, implied string) (*KeyVal, error) {
	if len(s) > maxValueBytes {
		return nil, fmt.Errorf("option value of %d bytes: %w", len(s), ErrSyntax)
	}
	k := &KeyVal{implied: implied, source: s}
	if strings.HasPrefix(s, "{") {
		obj, err := parseJSON(s)
		if err != nil {
			return nil, err
		}
		k.obj = obj
		return k, nil
	}
	// This follows QemuOpts, the more lenient of QEMU's two parsers; what the
	// stricter one (keyval) accepts means the same here.
	for rest, first := s, true; rest != ""; first = false {
		n := strings.IndexAny(rest, "=,")
		var p pair
		switch {
		case n >= 0 && rest[n] == '=':
			p.key = rest[:n]
			p.val, rest = cutValue(rest[n+1:])
		case first && implied != "":
			p.key, p.form = implied, bare
			p.val, rest = cutValue(rest)
		default:
			p.form, p.val = flag, "on"
			p.key, rest, _ = strings.Cut(rest, ",")
			if p.key == "" {
				continue // ",," between flags: QEMU complains, nothing is lost
			}
		}
		if strings.HasPrefix(p.key, "{") { // would read as JSON once it came first
			return nil, fmt.Errorf("key %.40q: %w", p.key, ErrSyntax)
		}
		if len(k.pairs) == maxPairs {
			return nil, fmt.Errorf("option value with more than %d keys: %w", maxPairs, ErrSyntax)
		}
		k.pairs = append(k.pairs, p)
	}
	return k, nil
}

// cutValue returns the value at the start of s, unescaped, and what follows the
// comma that ends it.
func cutValue(s string) (val, rest string) {
	var b strings.Builder
	for {
		n := strings.IndexByte(s, ',')
		if n < 0 {
			b.WriteString(s)
			return b.String(), ""
		}
		b.WriteString(s[:n])
		if n+1 == len(s) || s[n+1] != ',' {
			return b.String(), s[n+1:]
		}
		b.WriteByte(',')
		s = s[n+2:]
	}
}

// Escape doubles the commas of a value, as key=value lists want it.
func Escape(val string) string { return strings.ReplaceAll(val, ",", ",,") }

// JSON reports whether the value is a JSON object.
func (k *KeyVal) JSON() bool { return k.obj != nil }

// Get returns the value in force for key: the last one given. A flag is "on";
// "nowait" answers for "wait" with "off". In JSON form a key with dots reaches
// into nested objects and lists ("file.filename", "addr.0"), booleans read "on"
// and "off", numbers as they are written; objects, lists and null are absent.
func (k *KeyVal) Get(key string) (string, bool) {
	if k.obj != nil {
		n, _ := k.obj.find(key)
		if n == nil {
			return "", false
		}
		return n.text()
	}
	for i := len(k.pairs) - 1; i >= 0; i-- {
		p := &k.pairs[i]
		if p.key == key {
			return p.val, true
		}
		if p.form == flag && p.key == "no"+key {
			return "off", true
		}
	}
	return "", false
}

// All returns every value given for key, in order: hostfwd= of a user network
// may come many times.
func (k *KeyVal) All(key string) []string {
	if k.obj != nil {
		if v, ok := k.Get(key); ok {
			return []string{v}
		}
		return nil
	}
	var vals []string
	for _, p := range k.pairs {
		if p.key == key {
			vals = append(vals, p.val)
		}
	}
	return vals
}

// Set gives key the value val: in place where the key is there, at the end
// otherwise. Of a repeated key the last, which is in force, is changed. In JSON
// form a value keeps the type it had where val fits it ("off" stays a boolean)
// and is a string otherwise; see SetBool and SetInt for new keys. Missing
// objects on the way to a dotted key are created.
func (k *KeyVal) Set(key, val string) {
	k.changed = true
	if k.obj != nil {
		k.obj.set(key, func(old *node) *node { return old.retyped(val) })
		return
	}
	for i := len(k.pairs) - 1; i >= 0; i-- {
		p := &k.pairs[i]
		if p.key == key || p.form == flag && p.key == "no"+key {
			p.key, p.val = key, val
			if p.form == flag {
				p.form = explicit
			}
			return
		}
	}
	k.pairs = append(k.pairs, pair{key: key, val: val})
}

// SetBool is Set with "on" or "off", a real boolean in JSON form.
func (k *KeyVal) SetBool(key string, on bool) {
	if k.obj != nil {
		k.changed = true
		k.obj.set(key, func(*node) *node { return &node{kind: boolean, scalar: strconv.FormatBool(on)} })
		return
	}
	k.Set(key, map[bool]string{true: "on", false: "off"}[on])
}

// SetInt is Set with a number, a real one in JSON form.
func (k *KeyVal) SetInt(key string, v int64) {
	text := strconv.FormatInt(v, 10)
	if k.obj != nil {
		k.changed = true
		k.obj.set(key, func(*node) *node { return &node{kind: number, scalar: text} })
		return
	}
	k.Set(key, text)
}

// Delete removes every occurrence of key; in JSON form whatever is below it
// goes too.
func (k *KeyVal) Delete(key string) {
	if k.obj != nil {
		if k.obj.delete(key) {
			k.changed = true
		}
		return
	}
	kept := k.pairs[:0]
	for _, p := range k.pairs {
		if p.key != key && (p.form != flag || p.key != "no"+key) {
			kept = append(kept, p)
		}
	}
	k.changed = k.changed || len(kept) != len(k.pairs)
	k.pairs = kept
}

// Keys returns the keys in the order given, repeated ones repeatedly, those of
// nested JSON with dots. A flag is reported as it was written ("nowait").
func (k *KeyVal) Keys() []string {
	if k.obj != nil {
		var keys []string
		k.obj.walk("", func(path string, _ *node) { keys = append(keys, path) })
		return keys
	}
	keys := make([]string, len(k.pairs))
	for i, p := range k.pairs {
		keys[i] = p.key
	}
	return keys
}

// Rewrite calls f with every key and value, repeated ones included, and puts
// what it returns in the value's place. Only strings of JSON objects are shown
// to f.
func (k *KeyVal) Rewrite(f func(key, val string) string) {
	if k.obj != nil {
		k.obj.walk("", func(path string, n *node) {
			if n.kind != str {
				return
			}
			if v := f(path, n.scalar); v != n.scalar {
				n.scalar, k.changed = v, true
			}
		})
		return
	}
	for i := range k.pairs {
		p := &k.pairs[i]
		if p.form == flag {
			continue
		}
		if v := f(p.key, p.val); v != p.val {
			p.val, k.changed = v, true
		}
	}
}

// String is the value in QEMU's syntax: what was parsed while nothing has been
// changed, and the same form otherwise.
func (k *KeyVal) String() string {
	if !k.changed {
		return k.source
	}
	if k.obj != nil {
		var b strings.Builder
		k.obj.render(&b)
		return b.String()
	}
	var b strings.Builder
	for i, p := range k.pairs {
		if i > 0 {
			b.WriteByte(',')
		}
		switch {
		case p.form == flag && (i > 0 || k.implied == ""):
			b.WriteString(p.key)
		case p.form == flag && strings.HasPrefix(p.key, "no") && p.key != "nodelay":
			// First now, where it would be taken for the implied value.
			b.WriteString(p.key[2:] + "=off")
		case p.form == flag:
			b.WriteString(p.key + "=on")
		case p.form == bare && i == 0 && p.val != "" && !strings.ContainsAny(p.val, "=,") && p.val[0] != '{':
			b.WriteString(p.val)
		default:
			b.WriteString(p.key + "=" + Escape(p.val))
		}
	}
	return b.String()
}
