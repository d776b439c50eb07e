"""Operations between the products: their kinds, their written-out forms, and the components that compute them."""
