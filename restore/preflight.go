package restore

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/restore/plan"
)

// preflight looks for what would make QEMU fail half-way, so that the message can
// say which --map would help.
func preflight(ctx context.Context, p *plan.Plan) error {
	for _, f := range p.Files {
		want := f.Path
		if f.Created {
			want = filepath.Dir(f.Path)
		}
		if !filepath.IsAbs(want) {
			continue // relative to a directory that was not recorded
		}
		if _, err := os.Stat(want); err != nil {
			if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
				return problem.New(problem.Refused, "restore", f.Option+" "+f.Path, "%w", err)
			}
			return problem.New(problem.Refused, "restore", f.Option+" "+f.Path, "%w", os.ErrNotExist).
				WithHint("put it back, or say where it is: --map %s=NEWPATH", want)
		}
	}
	for _, s := range p.Listen {
		if err := free(ctx, s); err != nil {
			return problem.New(problem.Refused, "restore", s.Option+" on "+s.Address, "%w", err).
				WithHint("end what uses it, or give the restored VM another one: --map %s=NEW", mapKey(s))
		}
	}
	if p.Cwd != "" {
		if st, err := os.Stat(p.Cwd); err != nil || !st.IsDir() {
			for _, f := range p.Files {
				if !filepath.IsAbs(f.Path) || strings.HasPrefix(f.Path, p.Cwd+"/") {
					return problem.New(problem.Refused, "restore", p.Cwd, "the directory QEMU ran in is gone, and %s of %s lies in it", f.Path, f.Option).
						WithHint("put it back, or map the file")
				}
			}
		}
	}
	return nil
}

func mapKey(s plan.Socket) string {
	if s.Network == "unix" {
		return s.Address
	}
	return s.Address[strings.LastIndexByte(s.Address, ':')+1:]
}

var errInUse = errors.New("somebody listens there")

// free reports whether an address can be listened on.
func free(ctx context.Context, s plan.Socket) error {
	if s.Network == "unix" {
		dir := filepath.Dir(s.Address)
		if !strings.HasPrefix(s.Address, "@") {
			if _, err := os.Stat(dir); err != nil {
				return err
			}
		}
		d := net.Dialer{Timeout: time.Second}
		c, err := d.DialContext(ctx, "unix", s.Address)
		switch {
		case err == nil:
			c.Close()
			return errInUse
		case errors.Is(err, unix.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded):
			return errInUse // its queue is full
		}
		return nil // nobody, or nothing: QEMU replaces a stale socket
	}
	addr := s.Address
	if n := strings.LastIndexByte(addr, ':'); n >= 0 {
		host := strings.Trim(addr[:n], "[]")
		addr = net.JoinHostPort(host, addr[n+1:])
	}
	var lc net.ListenConfig
	var c io.Closer
	var err error
	if s.Network == "udp" {
		c, err = lc.ListenPacket(ctx, "udp", addr)
	} else {
		c, err = lc.Listen(ctx, "tcp", addr)
	}
	if err == nil {
		return c.Close()
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return errInUse
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return nil // a name that does not resolve, an address of another host: QEMU's to say
}
