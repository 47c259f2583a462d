package qmp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

const opDial = "connect to monitor"

var errStranger = errors.New("the monitor belongs to another process")

// Dial connects to a monitor, waits for its greeting and negotiates. A monitor
// that says nothing within a second is problem.Busy, with a hint who holds it. If
// the endpoint names a process, a monitor that turns out to be another's is
// refused before anything is said to it.
//
// The monitor that libvirt made for itself is reached through libvirt. While no
// daemon is connected to it, that is problem.Refused; see DialOrphan.
func Dial(ctx context.Context, e Endpoint) (*Client, error) {
	if ctx.Err() != nil {
		return nil, dialProblem(ctx, e, context.Cause(ctx))
	}
	if e.Libvirt {
		return dialLibvirt(ctx, e)
	}
	return dialSocket(ctx, e)
}

// dialSocket connects to the monitor's own socket.
func dialSocket(ctx context.Context, e Endpoint) (*Client, error) {
	begin := time.Now()
	conn, err := connect(ctx, e)
	if err != nil {
		return nil, dialProblem(ctx, e, err)
	}
	var check func() error
	if e.PID > 0 {
		check = func() error { return verifyPeer(e, conn) }
	}
	c, err := newClient(ctx, conn, e, max(greetingTimeout-time.Since(begin), 10*time.Millisecond), check)
	if err != nil {
		return nil, dialProblem(ctx, e, err)
	}
	return c, nil
}

// DialPID finds the monitors of a process and connects to the first that
// answers: free ones are tried before those that have a client, libvirt's own
// last.
func DialPID(ctx context.Context, pid int) (*Client, error) {
	eps, err := Discover(ctx, pid)
	if err != nil {
		return nil, err
	}
	rank := make(map[Endpoint]int, len(eps))
	for _, e := range eps {
		if len(clientsOf(e)) > 0 {
			rank[e] += 2
		}
		if e.Libvirt {
			rank[e]++
		}
	}
	slices.SortStableFunc(eps, func(a, b Endpoint) int { return rank[a] - rank[b] })
	var worst error
	for _, e := range eps {
		c, err := Dial(ctx, e)
		if err == nil {
			return c, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		// Busy is the most hopeful thing to report.
		if worst == nil || problem.Is(err, problem.Busy) && !problem.Is(worst, problem.Busy) {
			worst = err
		}
	}
	return nil, worst
}

func dialProblem(ctx context.Context, e Endpoint, err error) error {
	p := &problem.Error{Code: problem.Failed, Op: opDial, Object: e.String(), Err: err}
	switch {
	case ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)):
		if errors.Is(err, context.Canceled) {
			p.Code = problem.Cancelled
		}
	case errors.Is(err, ErrBusy), errors.Is(err, unix.EAGAIN):
		p.Err = ErrBusy
		busy(e, p)
	case errors.Is(err, errStranger):
		p.Code = problem.Refused
		p.WithHint("the address has been taken over since pid %d was started; give the right one with --qmp", e.PID)
	case errors.Is(err, ErrProtocol):
		p.Code = problem.Refused
		p.WithHint("this is not a QMP monitor (a human monitor, perhaps); give another one with --qmp")
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOTSOCK):
		p.Code = problem.NotFound
		p.WithHint("nobody listens there; is QEMU still running, and is the address right?")
	case errors.Is(err, ErrExited):
		p.Code = problem.NotFound
	case errors.Is(err, os.ErrPermission):
		p.Code = problem.Refused
		p.WithHint("run ckagent as root, or as the user QEMU runs as")
	case errors.Is(err, ErrLost):
		p.Code, p.Retryable = problem.Busy, true
		p.WithHint("the monitor was given up just now; try again")
	}
	return p
}

// busy fills in who is in the way.
func busy(e Endpoint, p *problem.Error) {
	p.Code, p.Retryable = problem.Busy, true
	if e.PID > 0 {
		if st, err := procstat.Read(e.PID); err == nil && st.Stopped() {
			p.WithHint("QEMU, pid %d, is itself stopped by a signal or a debugger; let it go on with kill -CONT %d", e.PID, e.PID)
			return
		}
	}
	holders := clientsOf(e)
	who := "another client"
	if len(holders) > 0 {
		who = holders[0]
	}
	if len(holders) == 0 {
		p.WithHint("a monitor serves one client at a time; close the other one, or QEMU hangs")
		return
	}
	p.WithHint("%s is connected, and a monitor serves one client at a time: end it, or start QEMU with a second -qmp", who)
}

// clientsOf names who is connected to a monitor, as far as can be seen from
// here.
func clientsOf(e Endpoint) []string {
	pid := e.PID
	if pid <= 0 {
		pid = os.Getpid()
	}
	var names []string
	name := func(inode uint64) {
		if inode == 0 {
			names = append(names, "another client")
		} else if owner, comm, ok := ownerOf(inode); ok {
			names = append(names, fmt.Sprintf("pid %d (%s)", owner, comm))
		} else {
			names = append(names, "another client")
		}
	}
	if e.Network == "tcp" {
		for _, s := range tcpClients(e, pid) {
			local, _ := tcpTable(os.Getpid())
			i := slices.IndexFunc(local, func(o tcpSocket) bool { return o.local == s.remote && o.remote == s.local })
			if i >= 0 && local[i].inode != 0 {
				name(local[i].inode)
			} else {
				names = append(names, "a client at "+s.remote.String())
			}
		}
		return names
	}
	for _, peer := range unixPeers(e, pid) {
		name(peer)
	}
	return names
}

// unixPeers are the far ends of QEMU's accepted connections; 0 for one that
// cannot be told.
func unixPeers(e Endpoint, pid int) (peers []uint64) {
	for try := 0; len(peers) == 0 && try < tableTries; try++ {
		for _, inode := range unixClients(e, pid) {
			var peer uint64
			err := inNetNS(e.PID, func() (err error) {
				peer, err = unixPeer(inode)
				return err
			})
			if err != nil {
				peer = 0
			}
			peers = append(peers, peer)
		}
	}
	return peers
}

// unixClients are QEMU's accepted connections at the endpoint's path: they
// carry the name of the socket that accepted them.
func unixClients(e Endpoint, pid int) (inodes []uint64) {
	table, err := unixTable(pid)
	if err != nil {
		return nil
	}
	path := strings.ReplaceAll(e.Address, "\x00", "@")
	for _, s := range table {
		if e.inode != 0 && s.inode == e.inode {
			path = s.path // as it was bound, relative perhaps
		}
	}
	for _, s := range table {
		if s.connected && s.path == path && s.inode != 0 {
			inodes = append(inodes, s.inode)
		}
	}
	return inodes
}

// tcpClients are QEMU's accepted connections at the endpoint's port.
func tcpClients(e Endpoint, pid int) []tcpSocket {
	addr, err := net.ResolveTCPAddr("tcp", e.Address)
	if err != nil {
		return nil
	}
	table, err := tcpTable(pid)
	if err != nil {
		return nil
	}
	var held map[uint64]int
	if e.PID > 0 {
		held, _ = sockets(pid)
	}
	return slices.DeleteFunc(table, func(s tcpSocket) bool {
		_, mine := held[s.inode]
		return s.state != tcpEstablished || int(s.local.Port()) != addr.Port || s.inode == 0 || held != nil && !mine
	})
}

// verifyPeer makes sure that the far end of conn is a socket of e.PID.
func verifyPeer(e Endpoint, conn net.Conn) error {
	held, err := sockets(e.PID)
	if err != nil {
		return fmt.Errorf("look into pid %d: %w", e.PID, err)
	}
	if e.Network == "tcp" {
		table, err := tcpTable(e.PID)
		if err != nil {
			return fmt.Errorf("look into pid %d: %w", e.PID, err)
		}
		near, far := addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
		for _, s := range table {
			if _, ok := held[s.inode]; ok && s.local == far && s.remote == near {
				return nil
			}
		}
		return fmt.Errorf("%w than pid %d", errStranger, e.PID)
	}
	own, err := inodeOf(conn)
	if err != nil {
		return err
	}
	var peer uint64
	ns := 0 // a socket belongs to the namespace it was made in
	if len(e.Address) > 0 && e.Address[0] == '@' {
		ns = e.PID
	}
	err = inNetNS(ns, func() (err error) {
		peer, err = unixPeer(own)
		return err
	})
	if err == nil && peer != 0 {
		if _, ok := held[peer]; ok {
			return nil
		}
		if pid, comm, ok := ownerOf(peer); ok {
			return fmt.Errorf("%w: pid %d (%s), not %d", errStranger, pid, comm, e.PID)
		}
		return fmt.Errorf("%w than pid %d", errStranger, e.PID)
	}
	// A kernel without unix_diag: whoever called listen(2) must do.
	rc, err := rawOf(conn)
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := rc.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if int(cred.Pid) != e.PID {
		return fmt.Errorf("%w: made by pid %d, not %d", errStranger, cred.Pid, e.PID)
	}
	return nil
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
