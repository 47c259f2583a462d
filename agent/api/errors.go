package api

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
)

// grpcCodes are for clients that know nothing of Problem.
var grpcCodes = map[problem.Code]codes.Code{
	problem.Usage: codes.InvalidArgument, problem.Refused: codes.FailedPrecondition, problem.Integrity: codes.DataLoss,
	problem.Busy: codes.Unavailable, problem.NotFound: codes.NotFound, problem.Store: codes.ResourceExhausted,
	problem.NoDaemon: codes.Unavailable, problem.Cancelled: codes.Canceled,
}

// ToStatus puts an error into the form that crosses the socket.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	p := &apipb.Problem{Code: string(problem.CodeOf(err)), Op: "ckagent", Cause: err.Error()}
	if e, ok := errors.AsType[*problem.Error](err); ok {
		p.Op, p.Object, p.Hint, p.Retryable = e.Op, e.Object, e.Hint, e.Retryable
		if e.Err != nil {
			p.Cause = e.Err.Error()
		} else {
			p.Cause = ""
		}
	}
	code, ok := grpcCodes[problem.Code(p.Code)]
	if !ok {
		code = codes.Unknown
	}
	text := question(err.Error())
	st, failed := status.New(code, text).WithDetails(Readable(p))
	if failed != nil {
		return status.Error(code, text)
	}
	return st.Err()
}

// FromStatus makes a problem.Error of what a call returned.
func FromStatus(op string, err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, d := range st.Details() {
		if p, ok := d.(*apipb.Problem); ok {
			e := problem.New(problem.Code(p.GetCode()), p.GetOp(), p.GetObject(), "%s", p.GetCause())
			e.Hint, e.Retryable = p.GetHint(), p.GetRetryable()
			if p.GetCause() == "" {
				e.Err = nil
			}
			return e
		}
	}
	switch st.Code() {
	case codes.Canceled:
		return problem.New(problem.Cancelled, op, "", "%w", context.Canceled)
	case codes.Unavailable:
		return problem.New(problem.NoDaemon, op, "", "%s", st.Message())
	}
	return problem.New(problem.Failed, op, "", "%s", st.Message())
}
