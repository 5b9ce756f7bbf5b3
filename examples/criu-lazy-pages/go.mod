module github.com/go-uffd/uffd/examples/criu-lazy-pages

go 1.26.0

require (
	github.com/checkpoint-restore/go-criu/v8 v8.3.0
	github.com/go-uffd/uffd v0.0.0
	golang.org/x/sys v0.49.0
	google.golang.org/protobuf v1.36.11
)

replace github.com/go-uffd/uffd => ../..
