package api

import (
	"context"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Readable is a message whose strings are all UTF-8: the wire takes no others, and one
// error that quotes the bytes of a path or of a program would cost the answer about every
// VM. What is not UTF-8 becomes a question mark, in a copy; a message that needs none of
// this is returned as it is.
func Readable[M proto.Message](m M) M {
	r := m.ProtoReflect()
	if !r.IsValid() || readable(r, false) {
		return m
	}
	c := proto.CloneOf(m)
	readable(c.ProtoReflect(), true)
	return c
}

// readable reports whether all strings of a message were UTF-8, and makes them so.
func readable(m protoreflect.Message, change bool) bool {
	all := true
	text := func(v protoreflect.Value, f protoreflect.FieldDescriptor, set func(protoreflect.Value)) {
		switch {
		case f.Message() != nil:
			all = readable(v.Message(), change) && all
		case f.Kind() == protoreflect.StringKind && !utf8.ValidString(v.String()):
			all = false
			if change {
				set(protoreflect.ValueOfString(question(v.String())))
			}
		}
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			var bad []string // keys
			v.Map().Range(func(k protoreflect.MapKey, e protoreflect.Value) bool {
				text(e, f.MapValue(), func(s protoreflect.Value) { v.Map().Set(k, s) })
				if f.MapKey().Kind() == protoreflect.StringKind && !utf8.ValidString(k.String()) {
					bad = append(bad, k.String())
				}
				return true
			})
			all = all && len(bad) == 0
			if change {
				for _, k := range bad {
					old := protoreflect.ValueOfString(k).MapKey()
					v.Map().Set(protoreflect.ValueOfString(question(k)).MapKey(), v.Map().Get(old))
					v.Map().Clear(old)
				}
			}
		case f.IsList():
			for i := range v.List().Len() {
				text(v.List().Get(i), f, func(s protoreflect.Value) { v.List().Set(i, s) })
			}
		default:
			text(v, f, func(s protoreflect.Value) { m.Set(f, s) })
		}
		return true
	})
	return all
}

func question(s string) string { return strings.ToValidUTF8(s, "?") }

// readableReplies has a server send nothing else.
var readableReplies = []grpc.ServerOption{
	grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		reply, err := next(ctx, req)
		if m, ok := reply.(proto.Message); ok && err == nil {
			reply = Readable(m)
		}
		return reply, err
	}),
	grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		return next(srv, readableStream{stream})
	}),
}

type readableStream struct{ grpc.ServerStream }

func (s readableStream) SendMsg(m any) error {
	if p, ok := m.(proto.Message); ok {
		m = Readable(p)
	}
	return s.ServerStream.SendMsg(m)
}
