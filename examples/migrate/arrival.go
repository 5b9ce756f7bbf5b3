//go:build linux

package main

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/pager"
)

// An arrival is a process that arrives over a connection, its memory last.
type arrival struct {
	hello  *hello
	remote *remote
	pager  pager.Pager
	client *pager.Client
	served chan error // what Serve returns
}

// accept learns what it is that arrives. The connection is the arrival's from now
// on.
func accept(conn net.Conn, limit int64) (*arrival, error) {
	conn.SetReadDeadline(time.Now().Add(patience))
	h, err := readHello(conn, os.Getpagesize(), limit)
	if err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetReadDeadline(time.Time{})
	a := &arrival{hello: h, remote: newRemote(conn, h)}
	a.pager.RetryFor = -1          // a remote that has failed stays so
	a.pager.OnFailure = pager.Hold // until the process is killed
	return a, nil
}

// takeOver serves memory, which is registered with file and still empty, and has
// the source let the process go. The process can run then.
func (a *arrival) takeOver(ctx context.Context, file *uffd.File, memory uffd.Range, peer pager.Peer) error {
	client, err := a.pager.Attach(file, pager.Region{Range: memory, Source: a.remote})
	if err != nil {
		return err
	}
	if peer != nil {
		client.Watch(peer)
	}
	a.client, a.served = client, make(chan error, 1)
	go func() { a.served <- client.Serve(ctx) }()
	return a.remote.ask(ctx, request{kind: ready}, nil)
}

// errEnded means that the process has ended before all its memory was here.
var errEnded = errors.New("the process has ended")

// complete gets all memory, while the process runs on, and makes sure that it is
// what the source has. It returns how many pages were compared. After an error
// other than errEnded the process must be killed: it would wait for ever.
func (a *arrival) complete(ctx context.Context, progress func(done, total uint64)) (pages int, err error) {
	if err = a.client.Populate(ctx, progress); err == nil {
		if pages, err = a.remote.verify(ctx); err == nil {
			err = a.client.Graduate(ctx, nil)
		}
	}
	if err != nil {
		if lost := a.remote.failure(); lost != nil {
			return pages, lost
		}
		a.client.Close()
		if <-a.served != nil { // nil: there is nobody left to serve
			return pages, err
		}
		err = errEnded
	}
	a.remote.ask(ctx, request{kind: done}, nil) // the process does not depend on that
	return pages, err
}

// close ends everything.
func (a *arrival) close() {
	a.remote.close()
	if a.client != nil {
		a.client.Close()
	}
}
