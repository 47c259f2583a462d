package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals/metrics"
	"github.com/ckagent/ckagent/agent/store"
)

// lookEvery is how often the VMs are looked at for Top and the metrics.
const lookEvery = time.Second

// readConnections bounds the clients of the socket that is for looking only. Each costs a
// descriptor, and those are the VMs' before they are a group's that may do nothing to them.
const readConnections = 64

// drainTimeout is how long calls under way are waited for at the end.
const drainTimeout = 2 * time.Second

// servers are the daemon's listeners.
type servers struct {
	d       *Daemon
	grpc    []*grpc.Server
	on      []net.Listener
	metrics net.Listener // nil: none
}

// listen opens everything that is to be served, or nothing.
func (d *Daemon) listen(ctx context.Context) (_ *servers, err error) {
	s := &servers{d: d}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	full := &service{Control: agent.NewControl(d.protectors), d: d}
	add := func(l net.Listener, g *grpc.Server) {
		apipb.RegisterAgentServer(g, full)
		s.grpc, s.on = append(s.grpc, g), append(s.on, l)
	}
	l, err := listenUnix(d.cfg.Socket, d.cfg.SocketGroup)
	if err != nil {
		return nil, err
	}
	add(l, api.NewServer())
	if d.cfg.ReadSocket != "" {
		if l, err = listenUnix(d.cfg.ReadSocket, d.cfg.ReadGroup); err != nil {
			return nil, err
		}
		add(netutil.LimitListener(l, readConnections), readOnlyServer())
	}
	if t := d.cfg.TLS; t.Listen != "" {
		cfg, err := t.config()
		if err != nil {
			return nil, err
		}
		tcp, err := (&net.ListenConfig{}).Listen(ctx, "tcp", t.Listen)
		if err != nil {
			return nil, problem.New(problem.Failed, "listen", t.Listen, "%w", err)
		}
		add(tcp, api.NewServer(grpc.Creds(credentials.NewTLS(cfg))))
	}
	if d.cfg.Metrics != "" {
		if s.metrics, err = metrics.Listen(d.cfg.Metrics); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// listenUnix makes a socket for root and a group. One that somebody answers on is not
// taken away.
func listenUnix(path, group string) (net.Listener, error) {
	gid := -1
	if group != "" {
		g, err := user.LookupGroup(group)
		if err != nil {
			return nil, problem.New(problem.Usage, "listen", path, "%w", err)
		}
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return nil, problem.New(problem.Usage, "listen", path, "group %s: %w", group, err)
		}
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		return nil, errors.Join(problem.New(problem.Busy, "listen", path, "somebody answers there").WithHint("another ckagent daemon runs; stop it first"), c.Close())
	}
	l, err := api.Listen(path)
	if err != nil || gid < 0 {
		return l, err
	}
	// The group may pass through the directory; what else is there is root's own.
	err = errors.Join(os.Chmod(filepath.Dir(path), 0o711), os.Chown(path, 0, gid), os.Chmod(path, 0o660))
	if err != nil {
		return nil, errors.Join(problem.New(problem.Failed, "listen", path, "%w", err), l.Close())
	}
	return l, nil
}

func (t TLS) config() (*tls.Config, error) {
	const op = "read certificates"
	cert, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, problem.New(problem.Usage, op, t.Cert, "%w", err)
	}
	pem, err := os.ReadFile(t.ClientCA)
	if err != nil {
		return nil, problem.New(problem.Usage, op, t.ClientCA, "%w", err)
	}
	ca := x509.NewCertPool()
	if !ca.AppendCertsFromPEM(pem) {
		return nil, problem.New(problem.Usage, op, t.ClientCA, "no certificate in it")
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: ca, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}, nil
}

// run serves until ctx ends, or a listener fails.
func (s *servers) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range s.grpc {
		wg.Go(func() {
			if err := s.grpc[i].Serve(s.on[i]); err != nil {
				cancel(fmt.Errorf("serve on %s: %w", s.on[i].Addr(), err))
			}
		})
	}
	s.watch(ctx, &wg, cancel)
	wg.Go(func() { watchdog(ctx, func() { s.d.all() }) }) // a table that is never free is the end
	if err := notify("READY=1"); err != nil {
		s.d.log.Warn("systemd was not told", "error", err)
	}
	s.d.log.Info("daemon", "socket", s.d.cfg.Socket, "vms", len(s.d.all()), "gone", len(s.d.departed()))
	<-ctx.Done()
	_ = notify("STOPPING=1") // it stops us anyway
	s.d.stop()               // the VMs are let go while the last calls end
	for _, g := range s.grpc {
		late := time.AfterFunc(drainTimeout, g.Stop)
		g.GracefulStop()
		late.Stop()
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil // told to end, and did
}

// watch looks at the VMs, for Top and the metrics.
func (s *servers) watch(ctx context.Context, wg *sync.WaitGroup, fail context.CancelCauseFunc) {
	if s.d.deps.Watch == nil {
		return
	}
	wg.Go(func() {
		w := s.d.deps.Watch(ctx)
		s.d.watch.Store(w)
		tick := time.NewTicker(lookEvery)
		defer tick.Stop()
		for {
			if _, err := w.Look(ctx); err != nil && ctx.Err() == nil {
				s.d.log.Debug("a VM could not be read", "error", err)
			}
			select {
			case <-ctx.Done():
				if err := w.Close(); err != nil {
					s.d.log.Warn("signals", "error", err)
				}
				return
			case <-tick.C:
			}
		}
	})
	if s.metrics == nil {
		return
	}
	st, err := store.Open(s.d.cfg.Defaults.Store)
	if err != nil {
		st = nil // no series about checkpoints
	}
	l := s.metrics
	s.metrics = nil
	wg.Go(func() {
		c := metrics.New(metrics.Source{Snapshot: s.d.snapshot, Store: st, Goal: time.Duration(s.d.cfg.Defaults.Interval)})
		if err := metrics.Serve(ctx, l, c); err != nil {
			fail(fmt.Errorf("serve metrics: %w", err))
		}
	})
}

// close takes the listeners away.
func (s *servers) close() (err error) {
	for i := range s.on {
		s.grpc[i].Stop()
		if e := s.on[i].Close(); e != nil && !errors.Is(e, net.ErrClosed) {
			err = errors.Join(err, e)
		}
	}
	if s.metrics != nil {
		err = errors.Join(err, s.metrics.Close())
	}
	return err
}
