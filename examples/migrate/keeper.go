//go:build linux

package main

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// A keeper has the memory of a process that goes on elsewhere, until all of it is
// there.
type keeper struct {
	conn   net.Conn
	hello  hello
	memory []byte

	// Of serve.
	resumed time.Duration // from the hello to the order to go on
	sent    int64         // bytes

	mu      sync.Mutex
	waiting []request
	err     error         // why there will be no more
	changed chan struct{} // waiting or err has
}

// errNotTaken means that the process has not gone on elsewhere, and never will:
// it can go on here.
var errNotTaken = errors.New("the destination did not take over")

// serve sends what the destination asks for, until it has everything. The
// process must not run on from when serve begins; if the error is errNotTaken, it
// may when serve ends. serve closes the connection.
func (k *keeper) serve() error {
	defer k.conn.Close()
	start := time.Now()
	k.changed = make(chan struct{}, 1)
	k.conn.SetDeadline(start.Add(patience))
	if err := k.hello.write(k.conn); err != nil {
		return fmt.Errorf("%w: %w", errNotTaken, err)
	}
	first, err := readRequest(k.conn, &k.hello)
	if err == nil && first.kind != ready {
		err = errors.New("it asks for memory before it is ready")
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errNotTaken, unexpected(err))
	}
	// From here on it may run there, whatever becomes of the reply.
	k.resumed = time.Since(start)
	if err := k.reply(first); err != nil {
		return lost(err)
	}
	k.conn.SetReadDeadline(time.Time{})
	go k.receive()
	for {
		q, err := k.next()
		if err == nil {
			err = k.reply(q)
		}
		if err != nil {
			return lost(cmp.Or(k.failure(), err))
		}
		if q.kind == done {
			return nil
		}
	}
}

func lost(err error) error {
	return fmt.Errorf("the destination is lost with a part of the process: %w", unexpected(err))
}

// receive reads requests.
func (k *keeper) receive() {
	for {
		q, err := readRequest(k.conn, &k.hello)
		if err == nil && q.kind == ready {
			err = errors.New("it says a second time that it is ready")
		}
		k.mu.Lock()
		if err == nil && len(k.waiting) == maxWaiting {
			err = fmt.Errorf("it has more than %d requests", maxWaiting)
		}
		if err == nil {
			k.waiting = append(k.waiting, q)
		}
		k.err = err
		k.mu.Unlock()
		select {
		case k.changed <- struct{}{}:
		default:
		}
		if err == io.EOF { // it may still want replies
			return
		}
		if err != nil {
			k.conn.Close() // ends a reply that it does not read
			return
		}
	}
}

// failure returns what receive has ended with, if that is the end.
func (k *keeper) failure() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err == io.EOF {
		return nil
	}
	return k.err
}

// next waits for a request. The shortest is first: what threads wait for is
// mostly a page, what the background reads 128 KiB.
func (k *keeper) next() (request, error) {
	for {
		if err := k.failure(); err != nil {
			return request{}, err
		}
		k.mu.Lock()
		if len(k.waiting) > 0 {
			defer k.mu.Unlock()
			shortest := 0
			for i, q := range k.waiting {
				if q.length < k.waiting[shortest].length {
					shortest = i
				}
			}
			q := k.waiting[shortest]
			k.waiting = slices.Delete(k.waiting, shortest, shortest+1)
			return q, nil
		}
		err := k.err
		k.mu.Unlock()
		if err != nil {
			return request{}, err
		}
		<-k.changed
	}
}

func (k *keeper) reply(q request) error {
	var payload []byte
	switch part := k.memory[q.offset:][:q.length]; q.kind {
	case read:
		payload = part
		k.sent += int64(len(part))
	case sums:
		for ; len(part) > 0; part = part[k.hello.pageSize:] {
			sum := sha256.Sum256(part[:k.hello.pageSize])
			payload = append(payload, sum[:]...)
		}
	}
	k.conn.SetWriteDeadline(time.Now().Add(patience))
	message := net.Buffers{replyHeader(q.id, payload), payload}
	_, err := message.WriteTo(k.conn)
	return err
}
