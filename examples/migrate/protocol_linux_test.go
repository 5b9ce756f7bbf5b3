package main

import (
	"bytes"
	"io"
	"math"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
)

var testHello = hello{pageSize: 4096, memory: 1 << 30, state: []byte("registers")}

func encode(t testing.TB, write func(io.Writer) error) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// with returns b with a byte, at i, that is x.
func with(b []byte, i int, x byte) []byte {
	b = bytes.Clone(b)
	b[i] = x
	return b
}

func TestHello(t *testing.T) {
	good := encode(t, testHello.write)
	for _, r := range []io.Reader{bytes.NewReader(good), iotest.OneByteReader(bytes.NewReader(good))} {
		h, err := readHello(r, 4096, 1<<30)
		if err != nil || !reflect.DeepEqual(*h, testHello) {
			t.Errorf("got %+v, %v", h, err)
		}
	}
	for i := range good {
		if h, err := readHello(bytes.NewReader(good[:i]), 4096, 1<<30); err == nil {
			t.Errorf("cut after %d bytes: %+v", i, h)
		}
	}
	for _, test := range []struct {
		name, want string
		message    []byte
	}{
		{"other magic", "does not want to migrate", with(good, 0, 'x')},
		{"other page size", "pages of 4352", with(good, 10, 0x11)},
		{"huge page size", "pages of 4278194176", with(good, 8, 0xff)},
		{"long state", "state has", with(good, 13, 2)},
		{"no memory", "0 bytes, is not whole pages", with(good, 20, 0)},
		{"half a page", "is not whole pages", with(good, 22, 8)},
		{"much memory", "more than the 1073741824", with(good, 17, 1)},
		{"endless memory", "more than the 1073741824", with(good, 16, 0xff)},
	} {
		if h, err := readHello(bytes.NewReader(test.message), 4096, 1<<30); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %+v, %v", test.name, h, err)
		}
	}
}

func TestRequest(t *testing.T) {
	for _, q := range []request{
		{kind: ready, id: 1},
		{kind: done, id: math.MaxUint32},
		{kind: read, id: 2, length: 4096},
		{kind: read, id: 2, offset: 1<<30 - maxRead, length: maxRead},
		{kind: sums, offset: 1<<30 - maxSums*4096, length: maxSums * 4096},
	} {
		got, err := readRequest(bytes.NewReader(encode(t, q.write)), &testHello)
		if err != nil || got != q {
			t.Errorf("got %+v, %v, want %+v", got, err, q)
		}
	}
	for _, test := range []struct {
		q    request
		want string
	}{
		{request{}, "unknown kind"},
		{request{kind: 5}, "unknown kind"},
		{request{kind: ready, length: 4096}, "not about memory"},
		{request{kind: done, offset: 4096}, "not about memory"},
		{request{kind: read}, "whole pages"},
		{request{kind: sums}, "whole pages"},
		{request{kind: read, length: 4095}, "whole pages"},
		{request{kind: read, offset: 1, length: 4096}, "whole pages"},
		{request{kind: read, length: maxRead + 4096}, "too many bytes"},
		{request{kind: sums, length: (maxSums + 1) * 4096}, "too many pages"},
		{request{kind: read, offset: 1 << 30, length: 4096}, "outside"},
		{request{kind: read, offset: 1<<30 - 4096, length: 8192}, "outside"},
		{request{kind: read, offset: -4096, length: 8192}, "outside"},
		{request{kind: read, offset: math.MinInt64, length: 4096}, "outside"},
	} {
		q, err := readRequest(bytes.NewReader(encode(t, test.q.write)), &testHello)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: got %+v, %v, want an error with %q", test.q, q, err, test.want)
		}
	}
	b := encode(t, request{kind: ready}.write)
	for i := range b {
		if _, err := readRequest(bytes.NewReader(b[:i]), &testHello); err != io.ErrUnexpectedEOF && i > 0 || err != io.EOF && i == 0 {
			t.Errorf("cut after %d bytes: %v", i, err)
		}
	}
}

func TestReply(t *testing.T) {
	payload := []byte("the memory")
	good := append(replyHeader(7, payload), payload...)
	expected := func(id uint32) (int, bool) { return len(payload), id == 7 }
	read := func(message []byte) (uint32, []byte, error) {
		return readReply(bytes.NewReader(message), make([]byte, len(payload)), expected)
	}
	if id, got, err := read(good); id != 7 || !bytes.Equal(got, payload) || err != nil {
		t.Errorf("got %d, %q, %v", id, got, err)
	}
	for i := range good {
		if _, got, err := read(good[:i]); err == nil {
			t.Errorf("cut after %d bytes: %q", i, got)
		}
		for bit := range 8 {
			if _, got, err := read(with(good, i, good[i]^1<<bit)); err == nil {
				t.Errorf("with bit %d of byte %d turned: %q", bit, i, got)
			}
		}
	}
	if _, _, err := readReply(bytes.NewReader(good), make([]byte, 4), expected); err == nil {
		t.Error("a reply has been read into less memory")
	}
}

func FuzzHello(f *testing.F) {
	f.Add(encode(f, testHello.write), int64(1<<30))
	f.Fuzz(func(t *testing.T, message []byte, limit int64) {
		limit = max(limit, 0)
		h, err := readHello(bytes.NewReader(message), 4096, limit)
		if err != nil {
			return
		}
		if h.memory <= 0 || h.memory > limit || h.memory%4096 != 0 || len(h.state) > maxState {
			t.Fatalf("%+v with limit %d", h, limit)
		}
		if b := encode(t, h.write); !bytes.HasPrefix(message, b) {
			t.Fatalf("%x is encoded as %x", message, b)
		}
	})
}

func FuzzRequest(f *testing.F) {
	f.Add(encode(f, request{kind: read, offset: 4096, length: 4096}.write), uint32(1))
	f.Fuzz(func(t *testing.T, message []byte, pages uint32) {
		h := hello{pageSize: 4096, memory: int64(pages) * 4096}
		q, err := readRequest(bytes.NewReader(message), &h)
		if err != nil {
			return
		}
		if q.offset < 0 || q.offset > h.memory || int64(q.length) > h.memory-q.offset {
			t.Fatalf("%+v of %d bytes", q, h.memory)
		}
		if q.kind == read && q.length > maxRead || q.kind == sums && q.length > maxSums*4096 {
			t.Fatalf("%+v", q)
		}
	})
}

func FuzzReply(f *testing.F) {
	f.Add(append(replyHeader(7, []byte("memory")), "memory"...), 6)
	f.Fuzz(func(t *testing.T, message []byte, length int) {
		length = max(length, 0)
		_, payload, err := readReply(bytes.NewReader(message), make([]byte, 64), func(uint32) (int, bool) { return length, true })
		if err == nil && (len(payload) != length || !bytes.HasPrefix(message[replySize:], payload)) {
			t.Fatalf("%x of %x", payload, message)
		}
	})
}
