package handoff_test

import (
	"context"
	"net"
	"time"

	"github.com/go-uffd/uffd/handoff"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// serveVM serves a Firecracker that has connected, until it exits.
func serveVM(ctx context.Context, p *pager.Pager, conn *net.UnixConn, image source.Source) error {
	hello, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	file, regions, err := handoff.ReceiveFirecracker(hello, conn, image.Size())
	if err != nil {
		return err
	}
	defer file.Close()

	var memory []pager.Region
	for _, r := range regions {
		memory = append(memory, pager.Region{Range: r.Range, Source: image, Offset: r.Offset, PageSize: r.PageSize})
	}
	client, err := p.Attach(file, memory...)
	if err != nil {
		return err
	}
	defer client.Close()

	peer, err := handoff.OpenPeer(conn)
	if err != nil {
		return err
	}
	defer peer.Close()
	client.Watch(peer)
	return client.Serve(ctx)
}

// A handler serves every Firecracker that restores a snapshot with
//
//	"mem_backend": {"backend_type": "Uffd", "backend_path": "/run/uffd.sock"}
//
// For one that does more, see examples/firecracker.
func ExampleReceiveFirecracker() {
	image, err := source.OpenFile("vm.mem")
	if err != nil {
		panic(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: "/run/uffd.sock", Net: "unix"})
	if err != nil {
		panic(err)
	}
	var p pager.Pager
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			panic(err)
		}
		go func() {
			defer conn.Close()
			serveVM(context.Background(), &p, conn, image)
		}()
	}
}
