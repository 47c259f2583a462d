package image

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
)

// TagBytes is the length of a page's tag.
const TagBytes = 16

// Tag identifies the content of a page among the pages of one scope. See FORMAT.md,
// section 11, for why two contents have the same one never.
type Tag [TagBytes]byte

// TagKey is the secret under which the pages of a scope get their tags: of one VM, or
// of VMs that trust each other. Tags of different scopes have nothing in common. Safe
// for concurrent use.
type TagKey struct {
	scope string
	id    string
	aead  cipher.AEAD
}

// TagSecretBytes is the length of the secret that all keys of a store come from.
const TagSecretBytes = 32

// NewTagKey derives a scope's key from the store's secret.
func NewTagKey(secret []byte, scope string) (*TagKey, error) {
	if len(secret) != TagSecretBytes {
		return nil, errors.New("a store's secret has 32 bytes")
	}
	if scope == "" || len(scope) > maxScopeBytes {
		return nil, errors.New("a scope has 1 to 300 bytes")
	}
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte("ckagent page tags 1\x00" + scope))
	key := mac.Sum(nil)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(append([]byte("ckagent tag key id 1\x00"), key...))
	return &TagKey{scope: scope, id: hex.EncodeToString(id[:keyIDBytes]), aead: aead}, nil
}

const (
	keyIDBytes    = 8
	maxScopeBytes = 300 // a VM's name and a word before it
)

// Scope is the name the key was made for.
func (k *TagKey) Scope() string { return k.scope }

// ID tells keys apart and gives nothing of them away.
func (k *TagKey) ID() string { return k.id }

// tagNonce is the same for all pages: a tag has to depend on the content alone.
var tagNonce [12]byte

// sum sets dst to a page's tag. It is the authentication of AES-GCM for a message that
// is empty but for the page as its additional data: GHASH, a polynomial over GF(2^128)
// at a secret point, plus a constant.
func (k *TagKey) sum(dst *Tag, page []byte) { k.aead.Seal(dst[:0], tagNonce[:], nil, page) }

// TagsRef names the file of a checkpoint's tags: those of all pages that are not zeros,
// in the order of the pagemap's entries.
type TagsRef struct {
	FileRef
	Scope string `json:"scope"`
	Key   string `json:"key"` // TagKey.ID
}

// made reports whether the tags were made with this key.
func (t *TagsRef) made(k *TagKey) bool {
	return t != nil && k != nil && t.Scope == k.scope && t.Key == k.id
}
