package qmp

import (
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
)

// view is what /proc shows of the target's sockets.
type view struct {
	pid  int
	cwd  string
	held map[uint64]int
	unix []unixSocket

	tcp     []tcpSocket // see listTCP
	tcpRead bool
}

func (v *view) read() { v.unix, _ = unixTable(v.pid) }

// listTCP reads the table of TCP sockets when a monitor may be in it: the kernel
// walks its whole hash table for that, milliseconds on a host with much memory.
func (v *view) listTCP() []tcpSocket {
	if !v.tcpRead {
		v.tcp, _ = tcpTable(v.pid)
		v.tcpRead = true
	}
	return v.tcp
}

// findUnix looks for a socket the target holds; a table that misses it is read
// again.
func (v *view) findUnix(match func(unixSocket) bool) (unixSocket, bool) {
	for try := 0; ; try++ {
		for _, s := range v.unix {
			if _, ours := v.held[s.inode]; ours && match(s) {
				return s, true
			}
		}
		if try == tableTries || len(v.held) == 0 {
			return unixSocket{}, false
		}
		v.read()
	}
}

func (v *view) endpoint(m monitorSpec) (Endpoint, string) {
	e := Endpoint{Network: "unix", Via: m.via, FD: -1, PID: v.pid, Libvirt: m.libvirt}
	switch m.address {
	case "fd":
		return v.inherited(e, m)
	case "abstract":
		e.Address = "@" + m.path
		if !m.tight && len(e.Address) < 108 {
			e.Address += strings.Repeat("\x00", 108-len(e.Address))
		}
		e.inode = v.listener(strings.ReplaceAll(e.Address, "\x00", "@"))
		return e, ""
	case "unix":
		e.Address = m.path
		e.inode = v.listener(m.path)
		if !filepath.IsAbs(m.path) && v.cwd != "" {
			e.Address = filepath.Join(v.cwd, m.path)
		}
		return e, ""
	}
	return v.tcpEndpoint(e, m)
}

// listener is the inode of the target's socket listening at a unix address.
func (v *view) listener(name string) uint64 {
	s, _ := v.findUnix(func(s unixSocket) bool { return s.listening && s.path == name })
	return s.inode
}

// inherited looks up a socket that was open before QEMU was started.
func (v *view) inherited(e Endpoint, m monitorSpec) (Endpoint, string) {
	fd, err := strconv.Atoi(m.fd)
	if err != nil || fd < 0 {
		return e, fmt.Sprintf("on a descriptor named %q, which only QEMU knows", m.fd)
	}
	e.FD = fd
	inode, ok := socketInode(procPath(v.pid, "fd", strconv.Itoa(fd)))
	if !ok {
		return e, fmt.Sprintf("on descriptor %d, which is no socket any more, or not visible to us", fd)
	}
	if s, ok := v.findUnix(func(s unixSocket) bool { return s.inode == inode }); ok {
		if !s.listening {
			return e, fmt.Sprintf("on descriptor %d, a connection whose other end somebody holds", fd)
		}
		e.Address, e.inode = s.path, inode
		if !strings.HasPrefix(s.path, "@") && !filepath.IsAbs(s.path) && v.cwd != "" {
			e.Address = filepath.Join(v.cwd, s.path)
		}
		e.Libvirt = e.Libvirt || strings.Contains(s.path, "/libvirt/qemu/")
		return e, ""
	}
	for _, s := range v.listTCP() {
		if s.inode != inode {
			continue
		}
		if s.state != tcpListen {
			return e, fmt.Sprintf("on descriptor %d, a connection whose other end somebody holds", fd)
		}
		e.Network, e.inode = "tcp", inode
		e.Address = net.JoinHostPort(reachable(s.local.Addr().String()), strconv.Itoa(int(s.local.Port())))
		return e, ""
	}
	return e, fmt.Sprintf("on descriptor %d, a socket of an unknown kind", fd)
}

func (v *view) tcpEndpoint(e Endpoint, m monitorSpec) (Endpoint, string) {
	e.Network = "tcp"
	first, err := net.LookupPort("tcp", m.port)
	if err != nil {
		return e, err.Error()
	}
	last := first
	if m.to != "" {
		if n, err := strconv.Atoi(m.to); err == nil && n >= first && n < 1<<16 {
			last = n
		}
	}
	// QEMU takes the first free port of a range, and any for 0: the table knows,
	// as long as there is one candidate.
	if first == 0 {
		last = 1<<16 - 1
	}
	var found []tcpSocket
	for _, s := range v.listTCP() {
		_, ours := v.held[s.inode]
		port := int(s.local.Port())
		if ours && s.state == tcpListen && port >= first && port <= last {
			found = append(found, s)
		}
	}
	anyHost := len(found) == 2 && found[0].local.Addr().IsUnspecified() && found[1].local.Addr().IsUnspecified() &&
		found[0].local.Addr().Is4() != found[1].local.Addr().Is4()
	switch {
	// For IPv4 and IPv6 there is a socket each, on two ports if QEMU chose.
	case len(found) == 1 || anyHost || len(found) > 1 && first == last:
		e.inode = found[0].inode
		e.Address = net.JoinHostPort(reachable(found[0].local.Addr().String()), strconv.Itoa(int(found[0].local.Port())))
		return e, ""
	case first != last:
		return e, "on a port QEMU chose, which cannot be told from here"
	}
	e.Address = net.JoinHostPort(reachable(m.host), strconv.Itoa(first))
	return e, ""
}

// reachable turns "any address" into one that can be connected to.
func reachable(host string) string {
	switch strings.Trim(host, "[]") {
	case "", "0.0.0.0":
		return "127.0.0.1"
	case "::":
		return "::1"
	}
	return strings.Trim(host, "[]")
}
