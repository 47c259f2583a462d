package cmdline

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func parse(t *testing.T, s, implied string) *KeyVal {
	t.Helper()
	k, err := ParseKeyVal(s, implied)
	if err != nil {
		t.Fatalf("ParseKeyVal(%q): %v", s, err)
	}
	return k
}

func TestGet(t *testing.T) {
	for _, c := range []struct{ s, implied, key, want string }{
		{"virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56", "driver", "driver", "virtio-net-pci"},
		{"driver=e1000,netdev=n0", "driver", "driver", "e1000"},
		{"socket,id=m,path=/a,,b,server,nowait", "backend", "path", "/a,b"},
		{"socket,id=m,path=/a,server,nowait", "backend", "server", "on"},
		{"socket,id=m,path=/a,server,nowait", "backend", "wait", "off"},
		{"socket,id=m,path=/a,wait=on,nowait", "backend", "wait", "off"},
		{"socket,id=m,path=/a,nowait,wait=on", "backend", "wait", "on"},
		{"socket,nodelay", "backend", "nodelay", "on"},
		{"file=a=b,if=virtio", "", "file", "a=b"},
		{"snapshot", "", "snapshot", "on"},
		{"a,,b=c", "guest", "guest", "a,b=c"},
		{"id=a,id=b", "", "id", "b"},
		{"file=,if=none", "", "file", ""},
		{"x=1,,,y=2", "", "x", "1,"},
		{"x=1,,,y=2", "", "y", "2"},
		{`{"driver":"qcow2","file":{"driver":"file","filename":"/a,b"},"read-only":true,"n":18446744073709551615}`, "driver", "file.filename", "/a,b"},
		{`{"driver":"qcow2","read-only":true}`, "driver", "read-only", "on"},
		{`{"n":18446744073709551615}`, "driver", "n", "18446744073709551615"},
		{`{"server.0.host":"h"}`, "driver", "server.0.host", "h"},
		{`{"server":[{"host":"h"},{"host":"i"}]}`, "driver", "server.1.host", "i"},
		{`{'driver':'it\'s "x"'}`, "driver", "driver", `it's "x"`},
	} {
		got, ok := parse(t, c.s, c.implied).Get(c.key)
		if !ok || got != c.want {
			t.Errorf("Get(%q) of %q = %q, %v; want %q", c.key, c.s, got, ok, c.want)
		}
	}
	for _, c := range []struct{ s, key string }{
		{"e1000", "netdev"}, {`{"file":{"a":1}}`, "file"}, {`{"file":[1]}`, "file.1"},
		{`{"file":[1]}`, "file.00"}, {`{"a":null}`, "a"}, {"", "driver"},
	} {
		if got, ok := parse(t, c.s, "driver").Get(c.key); ok {
			t.Errorf("Get(%q) of %q = %q; want none", c.key, c.s, got)
		}
	}
}

func TestChange(t *testing.T) {
	for _, c := range []struct {
		name, s, implied, want string
		change                 func(*KeyVal)
	}{
		{"untouched", "a,,,b=c", "driver", "a,,,b=c", func(*KeyVal) {}},
		{"in place", "memory-backend-file,id=m,mem-path=/a,prealloc=on", "qom-type",
			"memory-backend-file,id=m,mem-path=/b,,c,prealloc=on", func(k *KeyVal) { k.Set("mem-path", "/b,c") }},
		{"implied", "pc", "type", "q35,accel=tcg", func(k *KeyVal) { k.Set("type", "q35"); k.Set("accel", "tcg") }},
		{"implied needs its key", "vm", "guest", "guest=a=b,,c", func(k *KeyVal) { k.Set("guest", "a=b,c") }},
		{"implied made empty", "vm,process=x", "guest", "guest=,process=x", func(k *KeyVal) { k.Set("guest", "") }},
		{"implied that looks like JSON", "vm", "guest", "guest={", func(k *KeyVal) { k.Set("guest", "{") }},
		{"flag", "socket,nowait,server", "backend", "socket,wait=on,server", func(k *KeyVal) { k.Set("wait", "on") }},
		{"flag left first", "socket,server,nowait", "backend", "server=on,nowait", func(k *KeyVal) { k.Delete("backend") }},
		{"negated flag left first", "socket,nowait", "backend", "wait=off", func(k *KeyVal) { k.Delete("backend") }},
		{"delete", "x,a=1,b=2,a=3", "driver", "x,b=2", func(k *KeyVal) { k.Delete("a") }},
		{"delete nothing", "x,,,a", "driver", "x,,,a", func(k *KeyVal) { k.Delete("z") }},
		{"last one", "a=1,a=2", "", "a=1,a=3", func(k *KeyVal) { k.Set("a", "3") }},
		{"bool", "x", "qom-type", "x,prealloc=off,size=5", func(k *KeyVal) { k.SetBool("prealloc", false); k.SetInt("size", 5) }},
		{"rewrite", "user,hostfwd=tcp::1-:1,hostfwd=tcp::2-:2", "type", "user,hostfwd=tcp::1-:9,hostfwd=tcp::2-:9",
			func(k *KeyVal) {
				k.Rewrite(func(key, v string) string {
					if key == "hostfwd" {
						return v[:len(v)-1] + "9"
					}
					return v
				})
			}},
		{"json keeps order and types", `{"z":1,"a":true,"m":{"p":"/x"},"e":"<&>"}`, "", `{"z":2,"a":false,"m":{"p":"/y","q":"on"},"e":"<&>","n":7,"b":true}`,
			func(k *KeyVal) {
				k.Set("z", "2")
				k.Set("a", "off")
				k.Set("m.p", "/y")
				k.Set("m.q", "on")
				k.SetInt("n", 7)
				k.SetBool("b", true)
			}},
		{"json new objects", `{}`, "", `{"file":{"pr":{"x":"1"}}}`, func(k *KeyVal) { k.Set("file.pr.x", "1") }},
		{"json list", `{"l":[]}`, "", `{"l":["a","c"]}`, func(k *KeyVal) { k.Set("l.0", "a"); k.Set("l.1", "b"); k.Set("l.1", "c") }},
		{"json scalar in the way", `{"file":"x"}`, "", `{"file":{"n":"y"}}`, func(k *KeyVal) { k.Set("file.n", "y") }},
		{"json delete", `{"a":1,"b":{"c":2,"d":3},"l":[1,2]}`, "", `{"b":{"d":3},"l":[2]}`,
			func(k *KeyVal) { k.Delete("a"); k.Delete("b.c"); k.Delete("l.0"); k.Delete("nope") }},
		{"json number that no longer is one", `{"a":1}`, "", `{"a":"1G"}`, func(k *KeyVal) { k.Set("a", "1G") }},
		{"json rewrite", `{"a":"/x","b":[{"c":"/x"}],"n":1}`, "", `{"a":"/y","b":[{"c":"/y"}],"n":1}`,
			func(k *KeyVal) {
				k.Rewrite(func(_, v string) string { return strings.ReplaceAll(v, "/x", "/y") })
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := parse(t, c.s, c.implied)
			c.change(k)
			if got := k.String(); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestKeys(t *testing.T) {
	got := parse(t, "user,id=n,hostfwd=a,hostfwd=b,nowait", "type").Keys()
	if diff := cmp.Diff([]string{"type", "id", "hostfwd", "hostfwd", "nowait"}, got); diff != "" {
		t.Error(diff)
	}
	got = parse(t, `{"b":{"c":1,"a":[true,{"x":null}]},"a":2}`, "").Keys()
	if diff := cmp.Diff([]string{"b.c", "b.a.0", "b.a.1.x", "a"}, got); diff != "" {
		t.Error(diff)
	}
	if got := parse(t, "user,hostfwd=a,hostfwd=b", "type").All("hostfwd"); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("All: %q", got)
	}
}

func TestMalformedJSON(t *testing.T) {
	for _, s := range []string{`{`, `{"a"}`, `{"a":1}x`, `{"a":1,"a":2}`, `{"a":}`, `{} {}`,
		strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100)} {
		if _, err := ParseKeyVal(s, ""); !errors.Is(err, ErrSyntax) {
			t.Errorf("ParseKeyVal(%q): %v; want ErrSyntax", s, err)
		}
	}
}

func TestOptionKeyVal(t *testing.T) {
	k, err := Option{Name: "device", Value: "e1000,id=x", HasValue: true}.KeyVal()
	if err != nil {
		t.Fatal(err)
	}
	if d, _ := k.Get("driver"); d != "e1000" {
		t.Errorf("driver %q", d)
	}
	if _, err := (Option{Name: "kernel", Value: "/a", HasValue: true}).KeyVal(); !errors.Is(err, ErrSyntax) {
		t.Errorf("-kernel as key=value: %v", err)
	}
}

// TestRoundTripProperty makes lists of hostile keys and values and requires that
// what was set is what is read back after rendering and parsing.
func TestRoundTripProperty(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	word := func(alphabet string, least int) string {
		b := make([]byte, least+r.IntN(6))
		for i := range b {
			b[i] = alphabet[r.IntN(len(alphabet))]
		}
		return string(b)
	}
	for range 20000 {
		k := parse(t, word("ab,=no", 0), []string{"", "driver"}[r.IntN(2)])
		for range r.IntN(5) {
			if r.IntN(4) == 0 {
				k.Delete(word("abno", 0))
			} else {
				k.Set(word("abno", 1), word(`a,=b"{`, 0))
			}
		}
		checkRoundTrip(t, k)
	}
}

func checkRoundTrip(t *testing.T, k *KeyVal) {
	t.Helper()
	text := k.String()
	again, err := ParseKeyVal(text, k.implied)
	if err != nil {
		t.Fatalf("%q (%+v) does not parse: %v", text, k.pairs, err)
	}
	if k.obj != nil {
		if !reflect.DeepEqual(k.obj, again.obj) {
			t.Fatalf("%q read back differently", text)
		}
		return
	}
	for _, p := range k.pairs {
		for _, key := range []string{p.key, strings.TrimPrefix(p.key, "no")} {
			v1, ok1 := k.Get(key)
			v2, ok2 := again.Get(key)
			// A negated flag that came to stand first is spelled out and then
			// no longer answers to its short form.
			if p.form == flag && p.key == key && !ok2 {
				continue
			}
			if v1 != v2 || ok1 != ok2 {
				t.Fatalf("%q (%+v): %q is %q %v, read back %q %v", text, k.pairs, key, v1, ok1, v2, ok2)
			}
		}
	}
}

func FuzzParseKeyVal(f *testing.F) {
	for _, s := range []string{"virtio-net-pci,netdev=n0", "a,,b,server,nowait", `{"a":{"b":[1,true,null]}}`,
		`{'a':'\u0041'}`, "=,=,,=", "file=/x,,y,if=none"} {
		f.Add(s, "driver", "file", "a,b")
		f.Add(s, "", "a.b.0", "off")
	}
	f.Fuzz(func(t *testing.T, s, implied, key, val string) {
		if strings.ContainsAny(implied, "=,{") || strings.ContainsAny(key, "=,{") {
			return // these two are ours
		}
		k, err := ParseKeyVal(s, implied)
		if err != nil {
			if !errors.Is(err, ErrSyntax) {
				t.Fatalf("error of the wrong kind: %v", err)
			}
			return
		}
		if k.String() != s {
			t.Fatalf("%q untouched is %q", s, k.String())
		}
		checkRoundTrip(t, k)
		k.changed = true // render from the parsed form
		if k.JSON() && !json.Valid([]byte(k.String())) {
			t.Fatalf("%q rendered as %q: not JSON", s, k.String())
		}
		checkRoundTrip(t, k)
		if k.JSON() {
			return // invalid UTF-8 and paths through lists do not read back as set
		}
		k.Set(key, val)
		checkRoundTrip(t, k)
		if got, ok := k.Get(key); !ok || got != val {
			t.Fatalf("Set(%q, %q) then Get = %q, %v", key, val, got, ok)
		}
		k.Delete(key)
		if got, ok := k.Get(key); ok {
			t.Fatalf("Delete(%q) left %q", key, got)
		}
		checkRoundTrip(t, k)
	})
}
