package image

import (
	"crypto/aes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"math/rand"
	"testing"
)

// TestTagByTheBook computes tags by FORMAT.md, bit by bit.
func TestTagByTheBook(t *testing.T) {
	secret := make([]byte, TagSecretBytes)
	rnd := rand.New(rand.NewSource(1))
	rnd.Read(secret)
	key, err := NewTagKey(secret, "vm:a")
	if err != nil {
		t.Fatal(err)
	}
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte("ckagent page tags 1\x00vm:a"))
	block, err := aes.NewCipher(mac.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	var h, mask [16]byte
	block.Encrypt(h[:], h[:])
	mask[15] = 1
	block.Encrypt(mask[:], mask[:])
	for _, n := range []int{4096, 8192} {
		page := make([]byte, n)
		rnd.Read(page)
		var y [16]byte
		step := func(b []byte) {
			for i := range y {
				y[i] ^= b[i]
			}
			y = multiply(y, h)
		}
		for i := 0; i < n; i += 16 {
			step(page[i : i+16])
		}
		var lengths [16]byte
		binary.BigEndian.PutUint64(lengths[:], uint64(n)*8)
		step(lengths[:])
		for i := range y {
			y[i] ^= mask[i]
		}
		var got Tag
		key.sum(&got, page)
		if got != Tag(y) {
			t.Errorf("%d bytes: %x, by the book %x", n, got, y)
		}
	}
}

// multiply is the product in GF(2^128) as GCM writes its elements: the first bit is the
// coefficient of x^0, and x^128 = 1 + x + x^2 + x^7.
func multiply(a, b [16]byte) (z [16]byte) {
	for i := range 128 {
		if a[i/8]>>(7-i%8)&1 != 0 {
			for k := range z {
				z[k] ^= b[k]
			}
		}
		carry := b[15] & 1
		for k := 15; k > 0; k-- {
			b[k] = b[k]>>1 | b[k-1]<<7
		}
		b[0] >>= 1
		if carry != 0 {
			b[0] ^= 0xe1
		}
	}
	return z
}

func BenchmarkTag(b *testing.B) {
	key, err := NewTagKey(make([]byte, TagSecretBytes), "x")
	if err != nil {
		b.Fatal(err)
	}
	page := make([]byte, 4096)
	tag := new(Tag)
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		key.sum(tag, page)
	}
}
