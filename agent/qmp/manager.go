package qmp

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/libvirt"
	"github.com/ckagent/ckagent/agent/problem"
)

// Managed is a domain as its libvirt daemon knows it.
type Managed struct {
	Client *libvirt.Client // the caller's to close
	Domain libvirt.Domain
	URI    string
	Socket string // where it listens, as it sees it
}

// errNoDaemon says that nobody is at the other end of libvirt's monitor.
var errNoDaemon = errors.New("no libvirt daemon is connected to it")

const startDaemon = "start libvirt's daemon (systemctl start libvirtd, or virtqemud) and try again"

// OpenManaged connects to the daemon that manages the QEMU process pid: the one
// at the other end of its monitor, wherever it listens.
func OpenManaged(ctx context.Context, pid int) (Managed, error) {
	eps, err := Discover(ctx, pid)
	if err != nil {
		return Managed{}, err
	}
	for _, e := range eps {
		if e.Libvirt {
			m, err := openManaged(ctx, e)
			if err != nil {
				return Managed{}, managedProblem(ctx, e, err)
			}
			return m, nil
		}
	}
	return Managed{}, problem.New(problem.NotFound, "find libvirt", fmt.Sprintf("pid %d", pid), "it has no monitor of libvirt's")
}

func openManaged(ctx context.Context, e Endpoint) (m Managed, err error) {
	socket, uri, err := daemonOf(e)
	if err != nil {
		return m, err
	}
	uuid, err := uuidOf(e.PID)
	if err != nil {
		return m, err
	}
	conn, err := connect(ctx, socket)
	if err != nil {
		return m, fmt.Errorf("libvirt's socket %s: %w", socket.Address, err)
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return m, fmt.Errorf("libvirt's socket %s: %w", socket.Address, errors.ErrUnsupported)
	}
	ctx, cancel := context.WithTimeout(ctx, negotiationTimeout)
	defer cancel()
	c, err := libvirt.New(ctx, unixConn, uri)
	if err != nil {
		return m, err
	}
	m = Managed{Client: c, URI: uri, Socket: socket.Address}
	if m.Domain, err = c.Lookup(ctx, uuid); err != nil {
		_ = c.Close()
		return Managed{}, err
	}
	return m, nil
}

// daemonOf finds the daemon at the other end of a monitor and the socket it
// listens on, and what it calls its own driver.
func daemonOf(e Endpoint) (socket Endpoint, uri string, err error) {
	for _, peer := range unixPeers(e, e.PID) {
		pid, _, ok := ownerOf(peer)
		if peer == 0 || !ok {
			continue
		}
		held, err := sockets(pid)
		if err != nil {
			return socket, "", err
		}
		v := &view{pid: pid, held: held}
		v.read()
		s, ok := v.findUnix(func(s unixSocket) bool {
			name := filepath.Base(s.path)
			return s.listening && (name == "libvirt-sock" || name == "virtqemud-sock")
		})
		if !ok {
			continue // not a daemon of libvirt's
		}
		uri = "qemu:///system"
		var st unix.Stat_t // the directory belongs to the process's user
		if unix.Stat(procPath(pid), &st) == nil && st.Uid != 0 {
			uri = "qemu:///session"
		}
		return Endpoint{Network: "unix", Address: s.path, FD: -1, PID: pid, inode: s.inode}, uri, nil
	}
	return socket, "", errNoDaemon
}

// uuidOf reads -uuid, by which libvirt knows its domains.
func uuidOf(pid int) (id [16]byte, err error) {
	raw, err := readProc(pid, "cmdline")
	if err != nil {
		return id, err
	}
	args := strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
	opts, err := cmdline.Parse(args[1:])
	if err != nil {
		return id, err
	}
	for _, o := range opts {
		if o.Name != "uuid" {
			continue
		}
		b, err := hex.DecodeString(strings.ReplaceAll(o.Value, "-", ""))
		if err != nil || len(b) != len(id) {
			return id, fmt.Errorf("-uuid %s is no UUID", o.Value)
		}
		copy(id[:], b)
		return id, nil
	}
	return id, errors.New("it has no -uuid, by which libvirt would know it")
}

// dialLibvirt makes a client whose commands go through libvirt.
func dialLibvirt(ctx context.Context, e Endpoint) (*Client, error) {
	m, err := openManaged(ctx, e)
	if err != nil {
		return nil, managedProblem(ctx, e, err)
	}
	c, err := newRelayed(ctx, m, e)
	if err != nil {
		return nil, managedProblem(ctx, e, err)
	}
	return c, nil
}

// DialOrphan connects to the monitor that libvirt made for itself, while no
// daemon is there to hold it. It is for letting a machine go on that would
// otherwise stay paused until the daemon is back, and for nothing else: give it
// back at once, since the daemon that comes back waits for it.
func DialOrphan(ctx context.Context, e Endpoint) (*Client, error) {
	if _, _, err := daemonOf(e); err == nil {
		return nil, problem.New(problem.Busy, opDial, e.String(), "libvirt's daemon is connected to it")
	}
	return dialSocket(ctx, e)
}

func managedProblem(ctx context.Context, e Endpoint, err error) error {
	p := &problem.Error{Code: problem.Failed, Op: opDial, Object: e.String(), Err: err}
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		p.Code = problem.Cancelled
	case errors.Is(err, errNoDaemon):
		p.Code = problem.Refused
		p.Hint = startDaemon
	case errors.Is(err, errOldLibvirt):
		p.Code = problem.Refused
		p.WithHint("update libvirt, or give the domain a second monitor (<qemu:commandline> with -qmp unix:PATH,server=on,wait=off) and name it with --qmp")
	case errors.Is(err, errors.ErrUnsupported):
		p.Code = problem.Refused
		p.WithHint("let the daemon's unix socket do without SASL")
	case libvirt.IsNoDomain(err):
		p.Code = problem.NotFound
		p.WithHint("the daemon holds the monitor but knows no such domain; restart the daemon")
	case libvirt.IsBusy(err):
		p.Code, p.Retryable = problem.Busy, true
		p.WithHint("a job of libvirt's (a save, a migration, a snapshot) has the domain; wait for it to end")
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, libvirt.ErrLost):
		p.Code, p.Retryable = problem.Busy, true
		p.WithHint("libvirt's daemon does not answer; see whether it runs")
	}
	return p
}
