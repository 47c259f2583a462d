package api

//go:generate sh -c "PATH=$(dirname $(go tool -n protoc-gen-go)):$(dirname $(go tool -n protoc-gen-go-grpc)):$PATH protoc --go_out=apipb --go_opt=paths=source_relative --go-grpc_out=apipb --go-grpc_opt=paths=source_relative agent.proto"
