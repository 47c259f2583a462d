package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
)

// askTimeout is how long a process that lives may take to say what it protects.
const askTimeout = 5 * time.Second

// socketVariable names the daemon's socket where --socket does not.
const socketVariable = "CKAGENT_SOCKET"

// Files for a daemon that is asked over TCP: ours, and who signs the daemon's.
const (
	tlsCertVariable = "CKAGENT_TLS_CERT"
	tlsKeyVariable  = "CKAGENT_TLS_KEY"
	tlsCAVariable   = "CKAGENT_TLS_CA"
)

// protector is a running ckagent that protects VMs, and what it protects.
type protector struct {
	apipb.AgentClient
	conn   *grpc.ClientConn
	vms    []*apipb.VMStatus
	daemon bool
}

// protected is one VM, and whom to ask about it. Whoever gets one closes it.
type protected struct {
	*protector
	status *apipb.VMStatus
}

// asked is the socket that the user named; "": none.
func (a *app) asked() string {
	if a.socket != "" {
		return a.socket
	}
	return os.Getenv(socketVariable)
}

// dialDaemon connects to the daemon; problem.NoDaemon if there is none. Those who may
// not open its socket are answered by the one for reading, where that is open to them.
func (a *app) dialDaemon(ctx context.Context) (*grpc.ClientConn, error) {
	where := a.asked()
	if address, overTCP := strings.CutPrefix(where, "tls://"); overTCP {
		return dialTLS(address)
	}
	if where != "" {
		return api.Dial(ctx, where)
	}
	conn, err := api.Dial(ctx, api.DaemonSocket)
	if errors.Is(err, os.ErrPermission) {
		if reading, rerr := api.Dial(ctx, api.ReadSocket); rerr == nil {
			return reading, nil
		}
	}
	return conn, err
}

func dialTLS(address string) (*grpc.ClientConn, error) {
	const op = "connect to"
	cert, err := tls.LoadX509KeyPair(os.Getenv(tlsCertVariable), os.Getenv(tlsKeyVariable))
	if err != nil {
		return nil, problem.New(problem.Usage, op, address, "%w", err).WithHint("%s and %s name our certificate and its key", tlsCertVariable, tlsKeyVariable)
	}
	pem, err := os.ReadFile(os.Getenv(tlsCAVariable))
	if err != nil {
		return nil, problem.New(problem.Usage, op, address, "%w", err).WithHint("%s names the file of who signs the daemon's certificate", tlsCAVariable)
	}
	ca := x509.NewCertPool()
	if !ca.AppendCertsFromPEM(pem) {
		return nil, problem.New(problem.Usage, op, address, "%s: no certificate in it", os.Getenv(tlsCAVariable))
	}
	return api.DialTLS(address, &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: ca, MinVersion: tls.VersionTLS13})
}

// daemon asks the daemon what it protects.
func (a *app) daemon(ctx context.Context) (*protector, error) {
	conn, err := a.dialDaemon(ctx)
	if err != nil {
		return nil, err
	}
	return ask(ctx, conn, true)
}

func ask(ctx context.Context, conn *grpc.ClientConn, daemon bool) (*protector, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	p := &protector{AgentClient: apipb.NewAgentClient(conn), conn: conn, daemon: daemon}
	r, err := p.Status(ctx, &apipb.StatusRequest{})
	if err != nil {
		return nil, errors.Join(api.FromStatus("ask", err), conn.Close())
	}
	p.vms = r.GetVms()
	return p, nil
}

// everybody asks the daemon and every running attach; only the daemon, if the user named
// it. problem.NoDaemon if nobody answers.
func (a *app) everybody(ctx context.Context) (list []*protector, err error) {
	d, err := a.daemon(ctx)
	if err == nil {
		list = append(list, d)
	} else if a.asked() != "" {
		return nil, err
	}
	sockets, serr := api.Sockets(api.AttachDir)
	if serr != nil && !errors.Is(serr, os.ErrPermission) {
		err = errors.Join(err, problem.New(problem.Failed, "find VMs", "", "%w", serr))
	}
	for _, path := range sockets {
		conn, derr := api.Dial(ctx, path)
		if derr != nil {
			continue // it ends just now
		}
		if p, aerr := ask(ctx, conn, false); aerr == nil {
			list = append(list, p)
		} else {
			err = errors.Join(err, aerr)
		}
	}
	if len(list) > 0 {
		return list, nil
	}
	return nil, problem.New(problem.NoDaemon, "find VMs", "", "neither a daemon nor an attach answers: %w", err).
		WithHint("ckagent daemon, or ckagent attach QEMU-PID")
}

// findProtected finds the one protected VM of a name, vm:NAME or pid. The caller closes
// its connection.
func (a *app) findProtected(ctx context.Context, ref string) (_ *protected, err error) {
	const op = "find VM"
	all, err := a.everybody(ctx)
	if err != nil {
		return nil, err
	}
	var found []*protected
	for _, p := range all {
		n := len(found)
		for _, s := range p.vms {
			if agent.Names(ref, s.GetVm(), int(s.GetQemuPid())) {
				found = append(found, &protected{p, s})
			}
		}
		if len(found) == n {
			err = errors.Join(err, p.conn.Close())
		}
	}
	switch {
	case len(found) == 1:
		return found[0], err
	case len(found) == 0:
		return nil, errors.Join(problem.New(problem.NotFound, op, ref, "no ckagent protects such a VM").WithHint("ckagent vms lists them; ckagent attach QEMU-PID adds one"), err)
	}
	for _, p := range found {
		_ = p.conn.Close() // closed twice where both are one process's
	}
	return nil, problem.New(problem.Usage, op, ref, "%d protected VMs have this name", len(found)).WithHint("give the pid")
}
