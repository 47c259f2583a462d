package metrics

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// Listen opens a port on the loopback interface: what a host's VMs do is nobody
// else's business, and there is no access control here.
func Listen(address string) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, problem.New(problem.Usage, "serve metrics", address, "%w", err).WithHint("want an address such as 127.0.0.1:9464")
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil, problem.New(problem.Usage, "serve metrics", address, "not an address of the loopback interface").
			WithHint("metrics have no access control; let a proxy on this host give them to others")
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, problem.New(problem.Failed, "serve metrics", address, "%w", err)
	}
	return l, nil
}

const (
	headerTimeout = 5 * time.Second
	closeTimeout  = 2 * time.Second
)

// Serve answers scrapes of /metrics until ctx ends, and takes over the listener.
func Serve(ctx context.Context, l net.Listener, c *Collector) error {
	r := prometheus.NewRegistry()
	r.MustRegister(c, collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewGoCollector())
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: headerTimeout}))
	s := &http.Server{Handler: mux, ReadHeaderTimeout: headerTimeout}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serve metrics: %w", err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	err := s.Shutdown(stop)
	if err != nil {
		err = errors.Join(err, s.Close())
	}
	<-ended // ErrServerClosed
	return err
}

// sizeOf is the size of the file system a path is on.
func sizeOf(path string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, fmt.Errorf("size of %s: %w", path, err)
	}
	return st.Blocks * uint64(st.Bsize), nil
}
