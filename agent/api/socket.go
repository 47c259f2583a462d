package api

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// AttachDir is where running attaches have their sockets.
const AttachDir = "/run/ckagent/attach"

// DaemonSocket is where the daemon answers, ReadSocket where it answers those who may
// only look.
const (
	DaemonSocket = "/run/ckagent/daemon.sock"
	ReadSocket   = "/run/ckagent/read.sock"
)

// MaxMessageBytes bounds what either side accepts.
const MaxMessageBytes = 4 << 20

// Listen makes a socket that only root can open. A socket that is there already is
// replaced: the caller knows that nobody serves it.
func Listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("directory of the control socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old control socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("control socket: %w", err), l.Close())
	}
	return l, nil
}

// SelfSocket is the path of the calling process's socket in dir.
func SelfSocket(dir string) (string, error) {
	st, err := procstat.Read(os.Getpid())
	if err != nil {
		return "", fmt.Errorf("our own start time: %w", err)
	}
	return filepath.Join(dir, fmt.Sprintf("%d-%d.sock", os.Getpid(), st.StartTicks)), nil
}

// Sockets lists the sockets in dir whose processes live, and removes the others.
func Sockets(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the control sockets: %w", err)
	}
	var live []string
	for _, e := range entries {
		pid, start, ok := parseSocket(e.Name())
		if !ok {
			continue
		}
		path := filepath.Join(dir, e.Name())
		st, err := procstat.Read(pid)
		switch {
		case err == nil && st.StartTicks == start:
			live = append(live, path)
		case err == nil || errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH):
			_ = os.Remove(path) // whoever lists next tries again
		}
	}
	return live, nil
}

func parseSocket(name string) (pid int, start uint64, ok bool) {
	base, isSocket := strings.CutSuffix(name, ".sock")
	p, s, dashed := strings.Cut(base, "-")
	if !isSocket || !dashed {
		return 0, 0, false
	}
	pid, err := strconv.Atoi(p)
	if err != nil || pid <= 0 {
		return 0, 0, false
	}
	start, err = strconv.ParseUint(s, 10, 64)
	return pid, start, err == nil
}

// dialTimeout is far beyond what a process that lives takes to accept.
const dialTimeout = 2 * time.Second

// Dial connects to a socket. Nobody there is problem.NoDaemon.
func Dial(ctx context.Context, path string) (*grpc.ClientConn, error) {
	// Tried by hand first: gRPC connects when it is used, and says less.
	probe, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, problem.New(problem.NoDaemon, "connect to", path, "%w", err)
	}
	_ = probe.Close() // nothing was written
	conn, err := grpc.NewClient("passthrough:///"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessageBytes)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
	if err != nil {
		return nil, problem.New(problem.NoDaemon, "connect to", path, "%w", err)
	}
	return conn, nil
}

// DialTLS connects to a daemon's TCP listener, by mutual TLS.
func DialTLS(address string, cfg *tls.Config) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("dns:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessageBytes)))
	if err != nil {
		return nil, problem.New(problem.NoDaemon, "connect to", address, "%w", err)
	}
	return conn, nil
}

// NewServer is a gRPC server with the limits of this package, whose replies are Readable.
func NewServer(more ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append(append(more, readableReplies...), grpc.MaxRecvMsgSize(MaxMessageBytes), grpc.MaxConcurrentStreams(64))...)
}
