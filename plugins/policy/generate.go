package policy

//go:generate sh -c "PATH=$(dirname $(go tool -n protoc-gen-go)):$(dirname $(go tool -n protoc-gen-go-grpc)):$PATH protoc --go_out=policypb --go_opt=paths=source_relative --go-grpc_out=policypb --go-grpc_opt=paths=source_relative policy.proto"
