package problem

import "errors"

// Wire is an error on its way to another process, as JSON. Its cause is text there:
// errors.Is finds no errno on the other side.
type Wire struct {
	Code      Code   `json:"code"`
	Op        string `json:"op"`
	Object    string `json:"object,omitempty"`
	Hint      string `json:"hint,omitempty"`
	Retryable bool   `json:"retryable"`
	Cause     string `json:"cause"`
}

// ToWire makes an error ready to be sent; op is the operation of one that is no Error.
// Of several that were joined the first Error is taken. nil stays nil.
func ToWire(op string, err error) *Wire {
	if err == nil {
		return nil
	}
	p, ok := errors.AsType[*Error](err)
	if !ok {
		return &Wire{Code: CodeOf(err), Op: op, Cause: err.Error()}
	}
	w := &Wire{Code: p.Code, Op: p.Op, Object: p.Object, Hint: p.Hint, Retryable: p.Retryable}
	if p.Err != nil {
		w.Cause = p.Err.Error()
	}
	return w
}

// Err is the error again.
func (w *Wire) Err() error {
	e := &Error{Code: w.Code, Op: w.Op, Object: w.Object, Hint: w.Hint, Retryable: w.Retryable}
	if w.Cause != "" {
		e.Err = errors.New(w.Cause)
	}
	return e
}
