package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-uffd/uffd/internal/uffdtest"
)

// 100 MB.
const (
	keys      = 100_000
	valueSize = 1000
)

// Every key of a redis-server is as it was, on the first touch and in what a child
// of it writes to a file.
func TestRedis(t *testing.T) {
	for name, args := range delays {
		t.Run(name, func(t *testing.T) {
			uffdtest.RequireRoot(t)
			server := program(t, "redis-server", "usr/bin/redis-server")
			dir := t.TempDir()
			socket := filepath.Join(dir, "socket")
			redis := func(dump string) *exec.Cmd {
				return exec.Command(server[0], append(server[1:len(server):len(server)], "--port", "0",
					"--unixsocket", socket, "--save", "", "--dir", dir, "--dbfilename", dump)...)
			}
			c := start(t, redis("dump"))
			conn := c.dial(socket)
			conn.set(t)
			conn.Close()
			c.dump()
			r := c.restore(args...)
			conn = c.dial(socket)
			t.Logf("redis-server has answered after %v", time.Since(r.begin).Round(time.Millisecond))
			conn.do(t, "+Background saving started", "BGSAVE") // by a child
			conn.compare(t)
			t.Logf("%d keys compared after %v", keys, time.Since(r.begin).Round(time.Millisecond))
			conn.awaitSave(t)
			t.Logf("saved after %v", time.Since(r.begin).Round(time.Millisecond))
			conn.send("SHUTDOWN", "NOSAVE")
			conn.Close()
			n := r.complete()
			if len(n) != 1 || args != nil && (n[0]["forks"] == 0 || n[0]["faults"] == 0) {
				t.Errorf("the server has served %v", n)
			}

			again := start(t, redis("dump"))
			conn = again.dial(socket)
			defer conn.Close()
			conn.compare(t)
		})
	}
}

// A client speaks to a redis-server.
type client struct {
	net.Conn
	in  *bufio.Reader
	out *bufio.Writer
}

// dial connects to a redis-server, when that is ready.
func (c *checkpoint) dial(socket string) *client {
	c.Helper()
	for deadline := time.Now().Add(uffdtest.Patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			continue
		}
		conn.SetDeadline(deadline)
		r := &client{conn, bufio.NewReader(conn), bufio.NewWriter(conn)}
		r.send("PING")
		if answer, err := r.receive(); err == nil && answer == "+PONG" {
			return r
		}
		conn.Close() // it is loading
	}
	c.Fatal("redis-server does not answer")
	return nil
}

func (c *client) send(words ...string) {
	fmt.Fprintf(c.out, "*%d\r\n", len(words))
	for _, w := range words {
		fmt.Fprintf(c.out, "$%d\r\n%s\r\n", len(w), w)
	}
	c.out.Flush()
}

// receive returns the next answer: a line, or the string that it announces.
func (c *client) receive() (string, error) {
	line, err := c.in.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimSuffix(line, "\r\n")
	if !strings.HasPrefix(line, "$") {
		return line, nil
	}
	n, err := strconv.Atoi(line[1:])
	if err != nil || n < 0 {
		return line, err
	}
	text := make([]byte, n+2)
	_, err = io.ReadFull(c.in, text)
	return string(text[:n]), err
}

func (c *client) do(t *testing.T, want string, words ...string) {
	t.Helper()
	c.send(words...)
	if got, err := c.receive(); err != nil || got != want {
		t.Fatalf("%q: %q, %v, want %q", words, got, err, want)
	}
}

func key(i int) string { return fmt.Sprintf("key:%d", i) }

// value returns what key i holds.
func value(i int) string {
	var b strings.Builder
	for n := uint64(0); b.Len() < valueSize; n += 8 {
		fmt.Fprintf(&b, "%016x", word(uint64(i)+1, n))
	}
	return b.String()[:valueSize]
}

// pipelined sends all requests without waiting, and calls use with each answer.
func (c *client) pipelined(t *testing.T, request func(i int) []string, use func(i int, answer string)) {
	t.Helper()
	go func() {
		for i := range keys {
			c.send(request(i)...)
		}
	}()
	for i := range keys {
		answer, err := c.receive()
		if err != nil {
			t.Fatalf("key %d: %v", i, err)
		}
		use(i, answer)
	}
}

func (c *client) set(t *testing.T) {
	t.Helper()
	c.pipelined(t, func(i int) []string { return []string{"SET", key(i), value(i)} }, func(i int, answer string) {
		if answer != "+OK" {
			t.Fatalf("SET of key %d: %q", i, answer)
		}
	})
}

func (c *client) compare(t *testing.T) {
	t.Helper()
	c.do(t, fmt.Sprintf(":%d", keys), "DBSIZE")
	wrong := 0
	c.pipelined(t, func(i int) []string { return []string{"GET", key(i)} }, func(i int, answer string) {
		if answer != value(i) {
			wrong++
		}
	})
	if wrong > 0 {
		t.Errorf("%d of %d keys are wrong", wrong, keys)
	}
}

// awaitSave waits until a BGSAVE has succeeded.
func (c *client) awaitSave(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(uffdtest.Patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		c.send("INFO", "persistence")
		info, err := c.receive()
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(info, "rdb_bgsave_in_progress:0") {
			if !strings.Contains(info, "rdb_last_bgsave_status:ok") {
				t.Fatalf("BGSAVE has failed:\n%s", info)
			}
			return
		}
	}
	t.Fatal("BGSAVE does not end")
}
