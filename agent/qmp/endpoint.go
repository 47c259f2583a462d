package qmp

import (
	"fmt"
	"net"
	"strings"

	"github.com/ckagent/ckagent/agent/problem"
)

// Endpoint says where a monitor listens, and how that became known.
type Endpoint struct {
	Network string // "unix" or "tcp"
	Address string // unix: a path as the target sees it, or "@name" (abstract); tcp: host:port
	Via     string // "-qmp", "-mon qmp0 (-chardev)", "--qmp", ...
	FD      int    // the listening socket's descriptor in the target, -1 if not inherited
	Libvirt bool   // libvirt made this monitor for itself, and is the way to it

	// PID is the process the monitor must belong to; 0 if unknown. With it, paths
	// are looked up as that process sees them, its network namespace is used, and
	// a connection that turns out to end elsewhere is refused.
	PID int

	inode uint64 // of the listening socket, 0 if not found
}

func (e Endpoint) String() string {
	if e.Libvirt {
		return "libvirt's monitor " + e.Address
	}
	addr := e.Address
	if addr == "" && e.FD >= 0 {
		addr = fmt.Sprintf("fd %d", e.FD)
	}
	return e.Network + ":" + addr
}

// ParseEndpoint reads what --qmp takes: unix:PATH, PATH, unix:@ABSTRACT, or
// tcp:HOST:PORT.
func ParseEndpoint(s string) (Endpoint, error) {
	e := Endpoint{Network: "unix", Via: "--qmp", FD: -1}
	bad := func(why string) (Endpoint, error) {
		return Endpoint{}, problem.New(problem.Usage, "read monitor address", s, "%s", why).
			WithHint("give unix:PATH, a path, or tcp:HOST:PORT")
	}
	switch {
	case strings.HasPrefix(s, "tcp:"):
		e.Network, e.Address = "tcp", s[len("tcp:"):]
		host, port, err := net.SplitHostPort(e.Address)
		if err != nil || port == "" {
			return bad("not HOST:PORT")
		}
		if host == "" {
			e.Address = net.JoinHostPort("localhost", port)
		}
		return e, nil
	case strings.HasPrefix(s, "unix:"):
		e.Address = s[len("unix:"):]
	default:
		e.Address = s
	}
	if e.Address == "" || e.Address == "@" || strings.Contains(e.Address, "\x00") {
		return bad("no address")
	}
	if i := strings.IndexByte(e.Address, ':'); i > 0 && e.Address == s && !strings.Contains(e.Address[:i], "/") {
		return bad("unknown kind of address")
	}
	return e, nil
}
