package cmdline

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// encoding/json would lose the order of keys, which is the order in which QEMU
// reports the properties it dislikes and a reader compares two command lines, and
// the spelling of numbers; hence a small tree of our own.

const maxDepth = 64 // of nested objects; QEMU itself stops at 1024

type kind uint8

const (
	object kind = iota
	array
	str
	number
	boolean
	null
)

type node struct {
	kind   kind
	scalar string   // str: decoded; number, boolean: as in JSON
	keys   []string // object only, parallel to kids
	kids   []*node
}

var errJSON = fmt.Errorf("malformed JSON: %w", ErrSyntax)

func parseJSON(s string) (*node, error) {
	if strings.ContainsRune(s, '\'') {
		s = doubleQuotes(s)
	}
	dec := json.NewDecoder(strings.NewReader(s))
	dec.UseNumber()
	n, err := parseNode(dec, 0)
	if err != nil {
		return nil, err
	}
	if strings.TrimSpace(s[dec.InputOffset():]) != "" {
		return nil, fmt.Errorf("text after the JSON object: %w", ErrSyntax)
	}
	return n, nil
}

func parseNode(dec *json.Decoder, depth int) (*node, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("JSON nested deeper than %d: %w", maxDepth, ErrSyntax)
	}
	tok, err := dec.Token()
	if err != nil {
		return nil, errors.Join(errJSON, err)
	}
	switch t := tok.(type) {
	case string:
		return &node{kind: str, scalar: t}, nil
	case json.Number:
		return &node{kind: number, scalar: t.String()}, nil
	case bool:
		return &node{kind: boolean, scalar: strconv.FormatBool(t)}, nil
	case nil:
		return &node{kind: null}, nil
	case json.Delim:
		n := &node{kind: array}
		if t == '{' {
			n.kind = object
		}
		seen := make(map[string]bool)
		for dec.More() {
			if n.kind == object {
				key, err := dec.Token()
				if err != nil {
					return nil, errors.Join(errJSON, err)
				}
				name := key.(string) // the decoder accepts nothing else here
				if seen[name] {
					return nil, fmt.Errorf("JSON key %q given twice: %w", name, ErrSyntax)
				}
				seen[name] = true
				n.keys = append(n.keys, name)
			}
			kid, err := parseNode(dec, depth+1)
			if err != nil {
				return nil, err
			}
			n.kids = append(n.kids, kid)
		}
		if _, err := dec.Token(); err != nil { // the closing bracket
			return nil, errors.Join(errJSON, err)
		}
		return n, nil
	}
	return nil, errJSON
}

// doubleQuotes turns the single-quoted strings that QEMU also accepts into
// standard ones.
func doubleQuotes(s string) string {
	var b strings.Builder
	var quote byte
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case quote == 0:
			if c == '"' || c == '\'' {
				quote = c
				c = '"'
			}
			b.WriteByte(c)
		case c == '\\' && i+1 < len(s):
			i++
			if s[i] != '\'' { // \' is not an escape of standard JSON
				b.WriteByte('\\')
			}
			b.WriteByte(s[i])
		case c == quote:
			quote = 0
			b.WriteByte('"')
		case c == '"':
			b.WriteString(`\"`)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// child returns the value below n that the first part of path names, and what
// is left of the path. A key may itself contain dots, so the longest that is
// there wins.
func (n *node) child(path string) (index int, rest string) {
	if n.kind == array {
		head, rest, _ := strings.Cut(path, ".")
		i, err := strconv.Atoi(head)
		if err != nil || i < 0 || i >= len(n.kids) || strconv.Itoa(i) != head {
			return -1, ""
		}
		return i, rest
	}
	best := -1
	for i, key := range n.keys {
		if key == path {
			return i, ""
		}
		if len(path) > len(key) && path[len(key)] == '.' && strings.HasPrefix(path, key) &&
			(best < 0 || len(key) > len(n.keys[best])) {
			best, rest = i, path[len(key)+1:]
		}
	}
	return best, rest
}

// find returns the node at path and the parent it is in.
func (n *node) find(path string) (found, parent *node) {
	for {
		i, rest := n.child(path)
		if i < 0 {
			return nil, nil
		}
		if rest == "" {
			return n.kids[i], n
		}
		n, path = n.kids[i], rest
	}
}

// set puts make(old) at path; old is nil where there was nothing.
func (n *node) set(path string, make func(old *node) *node) {
	for {
		i, rest := n.child(path)
		switch {
		case i >= 0 && rest == "":
			n.kids[i] = make(n.kids[i])
			return
		case i >= 0 && (n.kids[i].kind == object || n.kids[i].kind == array):
			n, path = n.kids[i], rest
		case n.kind == array:
			n.kids = append(n.kids, make(nil))
			return
		default:
			head, rest, nested := strings.Cut(path, ".")
			if !nested {
				n.keys, n.kids = append(n.keys, path), append(n.kids, make(nil))
				return
			}
			kid := &node{kind: object}
			if i >= 0 {
				n.kids[i] = kid // a scalar stood where an object is needed
			} else {
				n.keys, n.kids = append(n.keys, head), append(n.kids, kid)
			}
			n, path = kid, rest
		}
	}
}

func (n *node) delete(path string) bool {
	found, parent := n.find(path)
	if found == nil {
		return false
	}
	for i, kid := range parent.kids {
		if kid == found {
			parent.kids = append(parent.kids[:i], parent.kids[i+1:]...)
			if parent.kind == object {
				parent.keys = append(parent.keys[:i], parent.keys[i+1:]...)
			}
		}
	}
	return true
}

// retyped is a node for val, of the type n had if val fits it.
func (n *node) retyped(val string) *node {
	if n != nil && n.kind == boolean {
		switch val {
		case "on", "yes", "true", "y":
			return &node{kind: boolean, scalar: "true"}
		case "off", "no", "false", "n":
			return &node{kind: boolean, scalar: "false"}
		}
	}
	if n != nil && n.kind == number {
		var num json.Number
		if json.Unmarshal([]byte(val), &num) == nil && num.String() == val {
			return &node{kind: number, scalar: val}
		}
	}
	return &node{kind: str, scalar: val}
}

func (n *node) text() (string, bool) {
	switch n.kind {
	case boolean:
		if n.scalar == "true" {
			return "on", true
		}
		return "off", true
	case str, number:
		return n.scalar, true
	}
	return "", false
}

// walk visits every scalar below n in order.
func (n *node) walk(path string, visit func(path string, n *node)) {
	for i, kid := range n.kids {
		p := strconv.Itoa(i)
		if n.kind == object {
			p = n.keys[i]
		}
		if path != "" {
			p = path + "." + p
		}
		if kid.kind == object || kid.kind == array {
			kid.walk(p, visit)
		} else {
			visit(p, kid)
		}
	}
}

func (n *node) render(b *strings.Builder) {
	switch n.kind {
	case object, array:
		brackets := "{}"
		if n.kind == array {
			brackets = "[]"
		}
		b.WriteByte(brackets[0])
		for i, kid := range n.kids {
			if i > 0 {
				b.WriteByte(',')
			}
			if n.kind == object {
				quote(b, n.keys[i])
				b.WriteByte(':')
			}
			kid.render(b)
		}
		b.WriteByte(brackets[1])
	case str:
		quote(b, n.scalar)
	case null:
		b.WriteString("null")
	default:
		b.WriteString(n.scalar)
	}
}

// quote writes a JSON string. A file name need not be UTF-8, yet JSON must be;
// QEMU refuses such strings too, so they never come from one that runs.
func quote(b *strings.Builder, s string) {
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "\uFFFD")
	}
	enc := json.NewEncoder(trimNewline{b})
	enc.SetEscapeHTML(false)
	_ = enc.Encode(s) // a string cannot fail, nor can a strings.Builder
}

type trimNewline struct{ b *strings.Builder }

func (t trimNewline) Write(p []byte) (int, error) {
	t.b.WriteString(strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}
