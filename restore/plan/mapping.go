package plan

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/problem"
)

// Mapping is one --map OLD=NEW.
type Mapping struct {
	Old, New string
	kind     mapKind
	oldHost  string // mapPort with a host
	oldPort  string
	newHost  string
	newPort  string
}

type mapKind uint8

const (
	mapPath   mapKind = iota // whole components of paths, absolute or not
	mapPort                  // a port, or host:port
	mapNetdev                // netdev:ID=backend
)

// ParseMapping reads OLD=NEW. OLD is a path (matched by whole components: an
// absolute one from its beginning, a relative one anywhere), a port or
// HOST:PORT, or netdev:ID, whose NEW is the value of a -netdev without its id,
// or "none".
func ParseMapping(s string) (Mapping, error) {
	bad := func(why string) error {
		return problem.New(problem.Usage, "parse --map", s, "%s", why).
			WithHint("write OLD=NEW: /old/dir=/new/dir, 5901=5902, 10.0.0.1:7000=10.0.0.2:7000 or netdev:ID=BACKEND")
	}
	// A path may hold "="; the first one separates, as in mount options.
	from, to, ok := strings.Cut(s, "=")
	if !ok || from == "" || to == "" {
		return Mapping{}, bad("it has no OLD or no NEW")
	}
	m := Mapping{Old: from, New: to}
	if id, ok := strings.CutPrefix(from, "netdev:"); ok {
		if id == "" || strings.ContainsAny(id, ",=") {
			return Mapping{}, bad("it names no netdev")
		}
		m.kind, m.Old = mapNetdev, id
		return m, nil
	}
	if h, p, ok := hostPort(from); ok {
		nh, np, ok := hostPort(to)
		if !ok {
			return Mapping{}, bad("a port can only become a port")
		}
		m.kind, m.oldHost, m.oldPort, m.newHost, m.newPort = mapPort, h, p, nh, np
		return m, nil
	}
	m.Old = strings.TrimRight(from, "/")
	m.New = strings.TrimRight(to, "/")
	if m.Old == "" || m.New == "" {
		return Mapping{}, bad("the root directory cannot be mapped")
	}
	if strings.ContainsRune(m.Old, 0) || strings.ContainsRune(m.New, 0) {
		return Mapping{}, bad("a path has no NUL")
	}
	return m, nil
}

// hostPort takes PORT, :PORT or HOST:PORT apart; paths are none of them.
func hostPort(s string) (host, port string, ok bool) {
	if isPort(s) {
		return "", s, true
	}
	if strings.ContainsRune(s, '/') {
		return "", "", false
	}
	host, port, err := net.SplitHostPort(s)
	return host, port, err == nil && isPort(port)
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0 && strconv.FormatUint(n, 10) == s
}

// mapper applies the mappings and remembers which of them matched anything.
type mapper struct {
	maps []Mapping
	used []bool
}

func newMapper(maps []Mapping) *mapper { return &mapper{maps: maps, used: make([]bool, len(maps))} }

// unused is the error for mappings that changed nothing: a typing error that
// would otherwise start the VM on the wrong files.
func (m *mapper) unused() error {
	for i, u := range m.used {
		if !u {
			old := m.maps[i].Old
			if m.maps[i].kind == mapNetdev {
				old = "netdev:" + old
			}
			return problem.New(problem.Usage, "apply --map", old+"="+m.maps[i].New, "the recorded command line has no such path, socket, port or netdev").
				WithHint("`ckagent restore --dry-run` shows the command line; only whole path components match")
		}
	}
	return nil
}

// path rewrites the paths in a value: the first mapping that matches wins, so
// that two mappings can swap two directories. known says that the value is a
// path even without a slash.
func (m *mapper) path(val string, known bool) string {
	for i, r := range m.maps {
		if r.kind != mapPath {
			continue
		}
		if !strings.HasPrefix(r.Old, "/") && !known && !strings.ContainsRune(val, '/') {
			continue
		}
		if out, ok := replaceComponents(val, r.Old, r.New); ok {
			m.used[i] = true
			return out
		}
	}
	return val
}

// file returns what exactly this path is mapped to, if it is.
func (m *mapper) file(path string) (string, bool) {
	for i, r := range m.maps {
		if r.kind == mapPath && r.Old == path {
			m.used[i] = true
			return r.New, true
		}
	}
	return "", false
}

// replaceComponents replaces old where it stands between component boundaries.
// In front of an absolute path stands the value's beginning or what ends a
// prefix such as "unix:" or "filename":"; in front of a relative one may also
// stand a slash.
func replaceComponents(val, old, repl string) (string, bool) {
	left := `:="'`
	if !strings.HasPrefix(old, "/") {
		left += "/"
	}
	var b strings.Builder
	found := false
	for at := 0; ; {
		n := strings.Index(val[at:], old)
		if n < 0 {
			b.WriteString(val[at:])
			break
		}
		start, end := at+n, at+n+len(old)
		if (start == 0 || strings.IndexByte(left, val[start-1]) >= 0) &&
			(end == len(val) || strings.IndexByte(`/,"'`, val[end]) >= 0) {
			b.WriteString(val[at:start] + repl)
			found = true
			at = end
			continue
		}
		b.WriteString(val[at : start+1])
		at = start + 1
	}
	return b.String(), found
}

// port maps one port, whose host is known or empty; the host is returned too
// because HOST:PORT may move to another address.
func (m *mapper) port(host, port string) (string, string) {
	for i, r := range m.maps {
		if r.kind != mapPort || r.oldPort != port || (r.oldHost != "" && r.oldHost != host) {
			continue
		}
		m.used[i] = true
		if r.newHost != "" {
			host = r.newHost
		}
		return host, r.newPort
	}
	return host, port
}

// address maps the HOST:PORT at the start of an address such as "host:port" or
// ":port,server"; anything else comes back as it was.
func (m *mapper) address(s string) string {
	addr, rest := s, ""
	if n := strings.IndexAny(s, ",@"); n >= 0 {
		addr, rest = s[:n], s[n:]
	}
	n := strings.LastIndexByte(addr, ':')
	if n < 0 || !isPort(addr[n+1:]) {
		return s
	}
	host, port := m.port(strings.Trim(addr[:n], "[]"), addr[n+1:])
	if strings.ContainsRune(host, ':') {
		host = "[" + host + "]"
	}
	return host + ":" + port + rest
}

// netdev returns the backend that replaces netdev id.
func (m *mapper) netdev(id string) (string, bool) {
	for i, r := range m.maps {
		if r.kind == mapNetdev && r.Old == id {
			m.used[i] = true
			return r.New, true
		}
	}
	return "", false
}

// hostForward maps the host side of a hostfwd= value:
// [tcp|udp|unix]:[hostaddr]:hostport-[guestaddr]:guestport.
func (m *mapper) hostForward(s string) string {
	proto, rest, ok := strings.Cut(s, ":")
	if !ok {
		return s
	}
	host, guest, ok := strings.Cut(rest, "-")
	if !ok {
		return s
	}
	return fmt.Sprintf("%s:%s-%s", proto, m.address(host), guest)
}
