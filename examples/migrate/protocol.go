//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// The source sends a hello. From then on the destination sends requests, and the
// source replies, in any order. All numbers are big-endian.
//
//	hello    magic [8]; page size uint32; length of state uint32; length of memory uint64; state
//	request  kind uint8; id uint32; offset uint64; length uint32
//	reply    id uint32; length uint32; CRC-32C of the payload uint32; payload
const (
	magic       = "uffdmig1"
	helloSize   = len(magic) + 4 + 4 + 8
	requestSize = 1 + 4 + 8 + 4
	replySize   = 4 + 4 + 4
)

// Limits of what a peer may send or ask for.
const (
	maxState   = 64 << 10
	maxRead    = 1 << 20 // bytes of memory in a reply
	maxSums    = 4096    // pages in a reply
	maxWaiting = 1024    // requests
)

type kind uint8

const (
	ready kind = 1 + iota // the reply is the order to go on: the source never will
	read                  // the reply is the memory
	sums                  // the reply is the SHA-256 of each page
	done                  // the source may forget the memory
)

// A hello is what the destination has to know before it can run the process.
type hello struct {
	pageSize int
	memory   int64  // bytes
	state    []byte // of the process, but for its memory
}

func (h *hello) write(w io.Writer) error {
	b := []byte(magic)
	b = binary.BigEndian.AppendUint32(b, uint32(h.pageSize))
	b = binary.BigEndian.AppendUint32(b, uint32(len(h.state)))
	b = binary.BigEndian.AppendUint64(b, uint64(h.memory))
	_, err := w.Write(append(b, h.state...))
	return err
}

// readHello reads the hello of a peer, whose memory may have limit bytes.
func readHello(r io.Reader, pageSize int, limit int64) (*hello, error) {
	var b [helloSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return nil, fmt.Errorf("reading the hello: %w", err)
	}
	if string(b[:len(magic)]) != magic {
		return nil, errors.New("the peer does not want to migrate a process")
	}
	rest := b[len(magic):]
	size, state, memory := binary.BigEndian.Uint32(rest), binary.BigEndian.Uint32(rest[4:]), binary.BigEndian.Uint64(rest[8:])
	switch {
	case uint64(size) != uint64(pageSize):
		return nil, fmt.Errorf("the peer has pages of %d bytes, this machine of %d", size, pageSize)
	case state > maxState:
		return nil, fmt.Errorf("the peer's state has %d bytes, more than %d", state, maxState)
	case memory == 0 || memory%uint64(size) != 0:
		return nil, fmt.Errorf("the peer's memory, %d bytes, is not whole pages of %d", memory, size)
	case memory > uint64(limit):
		return nil, fmt.Errorf("the peer's memory has %d bytes, more than the %d that are allowed here (-memory)", memory, limit)
	}
	h := &hello{pageSize: pageSize, memory: int64(memory), state: make([]byte, state)}
	if _, err := io.ReadFull(r, h.state); err != nil {
		return nil, fmt.Errorf("reading the state: %w", unexpected(err))
	}
	return h, nil
}

// A request is about length bytes of the memory at offset.
type request struct {
	kind   kind
	id     uint32
	offset int64
	length uint32
}

func (q request) write(w io.Writer) error {
	b := [requestSize]byte{0: byte(q.kind)}
	binary.BigEndian.PutUint32(b[1:], q.id)
	binary.BigEndian.PutUint64(b[5:], uint64(q.offset))
	binary.BigEndian.PutUint32(b[13:], q.length)
	_, err := w.Write(b[:])
	return err
}

// readRequest reads a request about memory. It returns io.EOF if there is none.
func readRequest(r io.Reader, h *hello) (request, error) {
	var b [requestSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return request{}, err
	}
	offset := binary.BigEndian.Uint64(b[5:])
	q := request{kind(b[0]), binary.BigEndian.Uint32(b[1:]), int64(offset), binary.BigEndian.Uint32(b[13:])}
	page := uint64(h.pageSize)
	length := uint64(q.length)
	bad := func(why string) (request, error) {
		return request{}, fmt.Errorf("request for %d bytes at %d: %s", length, offset, why)
	}
	switch q.kind {
	case ready, done:
		if offset != 0 || length != 0 {
			return bad("it is not about memory")
		}
		return q, nil
	case read:
		if length > maxRead {
			return bad("too many bytes")
		}
	case sums:
		if length/page > maxSums {
			return bad("too many pages")
		}
	default:
		return bad(fmt.Sprintf("unknown kind %d", q.kind))
	}
	switch {
	case length == 0 || length%page != 0 || offset%page != 0:
		return bad("not whole pages")
	case offset > uint64(h.memory) || length > uint64(h.memory)-offset:
		return bad(fmt.Sprintf("outside of the memory, which has %d", h.memory))
	}
	return q, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func replyHeader(id uint32, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, replySize), id)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(payload, castagnoli))
}

// readReply reads a reply into buf, which has room for the longest. expected
// returns how long the reply to a request has to be.
func readReply(r io.Reader, buf []byte, expected func(id uint32) (int, bool)) (id uint32, payload []byte, err error) {
	var b [replySize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, nil, err
	}
	id = binary.BigEndian.Uint32(b[:])
	length, sum := binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
	want, ok := expected(id)
	switch {
	case !ok:
		return 0, nil, fmt.Errorf("a reply to request %d, which was not made", id)
	case uint64(length) != uint64(want) || want > len(buf):
		return 0, nil, fmt.Errorf("a reply of %d bytes instead of %d", length, want)
	}
	payload = buf[:length]
	if _, err := io.ReadFull(r, payload); err != nil {
		return 0, nil, unexpected(err)
	}
	if crc32.Checksum(payload, castagnoli) != sum {
		return 0, nil, errors.New("a reply was damaged on the way: its checksum differs")
	}
	return id, payload, nil
}

// unexpected is for an end in the middle of a message.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
