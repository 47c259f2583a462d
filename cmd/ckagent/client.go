package main

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
)

// askTimeout is how long a process that lives may take to say what it protects.
const askTimeout = 5 * time.Second

// protected is a VM that a running attach protects, and the connection to it.
type protected struct {
	apipb.AgentClient
	conn   *grpc.ClientConn
	status *apipb.VMStatus
}

// findProtected finds the one protected VM of a name, vm:NAME or pid. The caller closes
// its connection.
func findProtected(ctx context.Context, ref string) (_ *protected, err error) {
	const op = "find VM"
	sockets, err := api.Sockets(api.AttachDir)
	if err != nil {
		return nil, problem.New(problem.Failed, op, ref, "%w", err)
	}
	var found []*protected
	var silent []error
	for _, path := range sockets {
		p, err := askWho(ctx, path)
		switch {
		case err != nil:
			silent = append(silent, err)
		case isVM(p.status, ref):
			found = append(found, p)
		default:
			err = p.conn.Close()
			silent = append(silent, err)
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	for _, p := range found {
		err = errors.Join(err, p.conn.Close())
	}
	if len(found) > 1 {
		return nil, errors.Join(problem.New(problem.Usage, op, ref, "%d protected VMs have this name", len(found)).WithHint("give the pid"), err)
	}
	if err := errors.Join(silent...); err != nil {
		return nil, problem.New(problem.NoDaemon, op, ref, "%w", err)
	}
	return nil, problem.New(problem.NotFound, op, ref, "no ckagent protects such a VM").WithHint("ckagent attach QEMU-PID")
}

func isVM(s *apipb.VMStatus, ref string) bool {
	name, _ := strings.CutPrefix(ref, "vm:")
	return s.GetVm() == name || strconv.Itoa(int(s.GetQemuPid())) == ref
}

func askWho(ctx context.Context, path string) (*protected, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := api.Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	c := apipb.NewAgentClient(conn)
	r, err := c.Status(ctx, &apipb.StatusRequest{})
	if err == nil && len(r.GetVms()) != 1 {
		err = problem.New(problem.Failed, "ask", path, "it protects %d VMs", len(r.GetVms()))
	}
	if err != nil {
		return nil, errors.Join(api.FromStatus("ask", err), conn.Close())
	}
	return &protected{c, conn, r.GetVms()[0]}, nil
}
